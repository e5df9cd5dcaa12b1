# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a session uses of the pipeline that it runs in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from diffusers import ModelMixin
from diffusers.video_processor import VideoProcessor

from .schedule import Scheduler


class Pipeline(Protocol):
    """A Diffusers pipeline with the components of a Wan checkpoint. Each member is documented by Diffusers, except
    `begin`, `roll_out` and `fps`."""

    config: Any
    tokenizer: Any
    text_encoder: Any
    transformer: ModelMixin
    vae: Any
    scheduler: Scheduler
    video_processor: VideoProcessor
    vae_scale_factor_spatial: int
    vae_scale_factor_temporal: int
    fps: float  # of its videos, as the checkpoint says
    _callback_tensor_inputs: list[str]
    _execution_device: torch.device

    # Read and changed by users and their callbacks during a run.
    guidance_scale: float
    do_classifier_free_guidance: bool
    interrupt: bool
    _guidance_scale: float
    _attention_kwargs: dict[str, Any] | None
    _num_timesteps: float
    _interrupt: bool

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def encode_video(self, video: torch.Tensor, height: int, width: int) -> torch.Tensor: ...

    def progress_bar(self, total: float | None = None) -> AbstractContextManager: ...

    def maybe_free_model_hooks(self) -> None: ...

    def begin(self, plan: Any) -> Any:
        """A new run of a plan."""
        ...

    def roll_out(self, run: Any) -> Iterator[Any]:
        """The finished chunks of a run."""
        ...
