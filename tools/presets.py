# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rollout, schedule, layout and method of each published model.

Self Forcing and Rolling Forcing get `"tokentrim"`: the paper measured it on those weights. Other models run with their
own layout and `"plain"` until a method has been measured on them.
"""

from .original import require


CHUNKS = {"rollout": "self_forcing", "num_frames_per_chunk": 3, "num_inference_steps": 4}
# Their global attention spans 21 latent frames, the training length.
WINDOW = {"window_size": 21, "num_sink_frames": 0, "relative_positions": False}
SELF_FORCING = {**CHUNKS, **WINDOW, "method": "tokentrim"}
CAUSAL_FORCING = {**SELF_FORCING, "method": "plain"}
ROLLING_FORCING = {
    **SELF_FORCING,
    "rollout": "rolling_forcing",
    "num_sink_frames": 3,
    "relative_positions": True,
    "num_inference_steps": 5,
}
PRESETS = {
    "self_forcing": SELF_FORCING,
    "rolling_forcing": ROLLING_FORCING,
    "longlive": {
        **CHUNKS,
        "layout": {"longlive": {"window_size": 12, "num_sink_frames": 3}},
        "prompt_transition": "recache",
        "method": "plain",
    },
    "causvid": {**SELF_FORCING, "num_inference_steps": 3, "method": "plain"},
    "causal_forcing": CAUSAL_FORCING,
    "causal_forcing_framewise": {**CAUSAL_FORCING, "num_frames_per_chunk": 1},
    # Causal Forcing++: its first frame takes four steps.
    "causal_forcing_2step": {
        **CAUSAL_FORCING,
        "num_frames_per_chunk": 1,
        "num_inference_steps": {"first": 4, "rest": 2},
    },
    "causal_forcing_1step": {
        **CAUSAL_FORCING,
        "num_frames_per_chunk": 1,
        "num_inference_steps": {"first": 4, "rest": 1},
    },
    "causal_forcing_long": {**ROLLING_FORCING, "num_inference_steps": 4, "method": "plain"},
    "reward_forcing": {
        **CHUNKS,
        "layout": {"ema_sink": {"window_size": 9, "num_sink_frames": 3}},
        "method": "plain",
    },
    # Three frames of context and the chunk.
    "krea_realtime": {
        **CHUNKS,
        "layout": {"attention_bias": {"window_size": 6, "weight": 0.3}},
        "method": "plain",
    },
    # Training-free methods on the weights of Self Forcing or Causal Forcing, without another method.
    "infinity_rope": {
        **CHUNKS,
        "layout": {"infinity_rope": {"window_size": 6, "num_sink_frames": 1}},
        "prompt_transition": "flush",
        "method": "plain",
    },
    "rolling_sink": {**CHUNKS, "layout": {"rolling_sink": {"window_size": 21}}, "method": "plain"},
}
# Arguments of FlowMatchLCMScheduler. CausVid's steps 1000, 757 and 522 are the sigmas 1, 28/37 and 12/23 (on the grid
# of its shift 8). They are not evenly spaced before any shift; this shift, stretched to end at 12/23, gives exactly them.
SCHEDULES = {name: {"shift": 5.0} for name in PRESETS} | {"causvid": {"shift": 400 / 421, "shift_terminal": 12 / 23}}

SIZES = {(30, 1536): "Wan 1.3B", (40, 5120): "Wan 14B"}  # blocks and width
WAN = {"attention_head_dim": 128, "freq_dim": 256, "text_dim": 4096, "in_channels": 16, "out_channels": 16}
WAN |= {"patch_size": (1, 2, 2)}
MODELS = {  # configs of their transformers
    "Wan 1.3B": {**WAN, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "Wan 14B": {**WAN, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
}
LARGE = ("krea_realtime",)  # all others are 1.3B
HOLD_MORE = ("ema_sink", "rolling_sink")  # layouts that hold a chunk beside their window


def list_presets(num_layers: int, width: int) -> list[str]:
    """The presets for weights of a size; none if no published model has this size."""
    size = SIZES.get((num_layers, width))
    return [] if size is None else [name for name in PRESETS if (name in LARGE) == (size == "Wan 14B")]


def check_size(preset: str, num_layers: int, width: int) -> None:
    """Refuse the preset of a model of another size. Weights of an unpublished size may take any."""
    fit = list_presets(num_layers, width)
    valid = f"one for {SIZES.get((num_layers, width))} ({', '.join(fit)})"
    require(not fit or preset in fit, "preset", valid, f"is {preset!r}, for another size")


def count_held_frames(preset: str) -> int:
    """Latent frames in the cache while a chunk is generated, that chunk included."""
    settings = PRESETS[preset]
    if "layout" not in settings:
        return settings["window_size"]
    ((name, layout),) = settings["layout"].items()
    return layout["window_size"] + (settings["num_frames_per_chunk"] if name in HOLD_MORE else 0)
