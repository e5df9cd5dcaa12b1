# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rollout and the schedule that each published model was trained for."""

# Their global attention spans 21 latent frames, the training length.
SELF_FORCING = {
    "rollout": "self_forcing",
    "num_frames_per_chunk": 3,
    "window_size": 21,
    "num_sink_frames": 0,
    "relative_positions": False,
    "num_inference_steps": 4,
}
PRESETS = {
    "self_forcing": SELF_FORCING,
    "rolling_forcing": {
        **SELF_FORCING,
        "rollout": "rolling_forcing",
        "num_sink_frames": 3,
        "relative_positions": True,
        "num_inference_steps": 5,
    },
    "longlive": {**SELF_FORCING, "window_size": 12, "num_sink_frames": 3},
    "causvid": {**SELF_FORCING, "num_inference_steps": 3},
    "causal_forcing": SELF_FORCING,
    "causal_forcing_framewise": {**SELF_FORCING, "num_frames_per_chunk": 1},
}
# Arguments of FlowMatchLCMScheduler. CausVid's steps 1000, 757 and 522 are the sigmas 1, 28/37 and 12/23 (on the grid
# of its shift 8). They are not evenly spaced before any shift; this shift, stretched to end at 12/23, gives exactly them.
SCHEDULES = {name: {"shift": 5.0} for name in PRESETS} | {"causvid": {"shift": 400 / 421, "shift_terminal": 12 / 23}}
