# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Names that a user types, and their settings, without PyTorch; `tests/test_names.py` holds them equal to the registries."""

from difflib import get_close_matches
from typing import Any


INDEX = "model_index.json"
FPS = 16  # frames per second where a checkpoint says nothing
METHODS = ("plain", "tokentrim", "paper", "tokentrim_reference", "tokentrim_plus")
TRIM = (
    *("prune_fraction", "drift_sensitivity", "warmup_chunks", "max_regenerations", "drift_signal", "prune_weight"),
    *("reference", "criterion", "regenerate"),
)
PARTS = {  # of a method: policies, and hooks of the denoiser
    "tokentrim": TRIM,
    "quarantine": ("sensitivity",),
    "reanchor": ("match", "tolerance", "patience", "strength"),
    "token_drift": ("drift_signal",),
    "flowmo": ("iterations", "learning_rate", "steps", "chunks"),
}
SINK = ("window_size", "num_sink_frames")
COMMIT = (*SINK, "move_sink", "commit_window_size", "recency_bias")
LAYOUTS = {
    "window": (*SINK, "relative_positions", "sink_at_commit"),
    "infinity_rope": SINK,
    "longlive": (*SINK, "relative_positions", "renew_sink"),
    "commit_forcing": COMMIT,
    "recency": COMMIT,
    "rolling_sink": ("window_size",),
    "deep_sink": (*SINK, "budget", "num_recent_frames"),
    "memrope": (*SINK, "num_recent_frames", "slow", "fast"),
    "ema_sink": (*SINK, "decay"),
    "tether": (*SINK, "num_recent_frames", "diversity", "align", "temperature"),
    "tame": (*SINK, "relative_positions", "align"),
    "attention_bias": (*SINK, "weight"),
    "latent_memory": (*SINK, "num_memory_frames", "num_excluded_frames"),
    "id_forcing": (*SINK, "re_encode", "num_native_chunks"),
    "shots": (*SINK, "shot_offset", "clean_recache"),
    "triattention": (*SINK, "num_recent_frames", "budget", "compress_every", "per_layer", "statistics"),
    "pyramid": ("labels", "num_recent_frames", "period", "num_cyclic", "interval", "num_strided", "num_merged"),
    "by_head": ("labels", "layouts"),
    "strided": (*SINK, "stride", "num_strided_frames", "relative_positions"),
    "pinned": ("frames", *SINK, "relative_positions"),
}
ROLLOUTS = ("self_forcing", "rolling_forcing", "wave_forcing")
TRANSITIONS = ("keep", "recache", "flush", "cut", "shot")
# Arguments of the call that a JSON file can hold, but for the prompt, which has its own place.
ARGUMENTS = tuple(
    """attention_kwargs blend_chunks chunk_partition context_noise drift_sensitivity drift_signal guidance_scale height layout
    max_regenerations max_sequence_length method negative_prompt num_frames num_frames_per_chunk num_inference_steps
    num_sink_frames num_videos_per_prompt output_type pad_keys prompt_schedule prompt_transition protect_conditioning
    prune_fraction relative_positions rollout sigmas sink_at_commit timesteps use_kv_cache use_mean_velocity warmup_chunks
    width window_size""".split()
)
# Those that are tensors, pictures, functions or random numbers.
OBJECTS = tuple(
    """callback_on_step_end callback_on_step_end_tensor_inputs generator image latents negative_prompt_embeds on_chunk prompt
    prompt_embeds renoise return_dict video video_latents""".split()
)


def check_method(name: str, method: Any) -> None:
    """Raise `ValueError` for a method that does not exist; values of settings are checked when it is made."""
    for part in method if isinstance(method, list) else [method]:
        if isinstance(part, dict):
            check_named(name, part, PARTS, "a dict of policies with their settings")
        else:
            check_name(name, part, tuple(dict.fromkeys([*METHODS, *PARTS])))


def check_layout(name: str, layout: Any) -> None:
    """Raise `ValueError` for a layout that does not exist; values of settings are checked when it is made."""
    if isinstance(layout, dict):
        if len(layout) != 1:
            raise ValueError(f"{name} must be a dict of one layout with its settings, but is {layout!r}.")
        check_named(name, layout, LAYOUTS, "a dict of a layout with its settings")
    else:
        check_name(name, layout, tuple(LAYOUTS))


def check_named(name: str, given: dict, known: dict[str, tuple[str, ...]], valid: str) -> None:
    """A dict of names with their settings, all of them known."""
    for each, settings in given.items():
        check_name(name, each, tuple(known))
        if not isinstance(settings, dict):
            raise ValueError(f"{name} must be {valid}, but {each} has {settings!r}.")
        for setting in settings:
            check_name(f"{name}: a setting of {each}", setting, known[each])


def check_name(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        close = get_close_matches(value, known, 1) if isinstance(value, str) else []
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(f"{name} must be one of {', '.join(known)}, but is {value!r}{hint}")
