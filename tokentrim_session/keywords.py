# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a call as types, for editors and type checkers; `tests/test_types.py` holds them equal to `__call__`."""

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from ..tokentrim_policies.policy import ContextPolicy
from ..tokentrim_views.layout import Layout


class CallArguments(TypedDict, total=False):
    """All arguments of [`TokenTrimPipeline.__call__`] after `prompt`."""

    video: torch.Tensor | np.ndarray | list | None
    video_latents: torch.Tensor | None
    negative_prompt: str | list[str] | None
    height: int | None
    width: int | None
    num_frames: int | None
    num_inference_steps: int | dict[str, int] | None
    sigmas: list[float] | None
    timesteps: list[float] | None
    guidance_scale: float
    num_videos_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    output_type: str
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: list[str]
    max_sequence_length: int | None
    use_mean_velocity: bool
    use_kv_cache: bool
    chunk_partition: list[int] | None
    prompt_schedule: dict | list[dict] | None
    prompt_transition: str | dict[int, str] | None
    blend_chunks: int
    method: str | dict | list | ContextPolicy | None
    prune_fraction: float | None
    drift_sensitivity: float | None
    warmup_chunks: int | None
    max_regenerations: int | None
    drift_signal: str | None
    rollout: str | None
    num_frames_per_chunk: int | None
    layout: str | dict | Layout | None
    window_size: int | str | None
    num_sink_frames: int | None
    relative_positions: bool | None
    sink_at_commit: bool | None
    protect_conditioning: bool
    pad_keys: bool
    renoise: Callable[[int, int], torch.Tensor] | None
    on_chunk: Callable[[int, torch.Tensor, list[dict]], None] | None
    image: PipelineImageInput | None
    context_noise: float | None
