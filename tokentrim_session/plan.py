# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What one call does, as a frozen value: `arguments.py` makes it, and the rest of the session reads it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..tokentrim_backbones.backbone import BackboneOptions
from ..tokentrim_policies.registry import Method
from ..tokentrim_views.layout import Layout
from .partition import count_latent_frames
from .prompts import PromptChange, Prompts


@dataclass(frozen=True)
class Sizes:
    """How large the videos are, and how their latent frames make chunks.

    Args:
        frame_shape (`tuple`): shape of the latents of one frame, (B, C, H, W).
        height (`int`), width (`int`): size of the video in pixels.
        temporal_factor (`int`): frames of a latent frame; the first latent frame is one frame.
        chunk_partition (`list[int]`): latent frames of each chunk. In a video without an end, the last size repeats.
        num_frames (`int`, *optional*):
            frames of the video, which may end inside its last chunk; `None`: it has no end.
        num_given_chunks (`int`): first chunks that are given, not generated.
        num_protected_frames (`int`): first latent frames that eviction leaves alone.
        num_videos_per_prompt (`int`): videos of each prompt, next to each other in the batch.
    """

    frame_shape: tuple[int, int, int, int]
    height: int
    width: int
    temporal_factor: int
    chunk_partition: list[int]
    num_frames: int | None
    num_given_chunks: int
    num_protected_frames: int
    num_videos_per_prompt: int

    @property
    def num_videos(self) -> int:
        return self.frame_shape[0]

    @property
    def num_prompts(self) -> int:
        return self.num_videos // self.num_videos_per_prompt

    @property
    def is_endless(self) -> bool:
        return self.num_frames is None

    def has_chunk(self, index: int) -> bool:
        return self.is_endless or index < len(self.chunk_partition)

    def chunk_size(self, index: int) -> int:
        """Latent frames of a chunk."""
        return self.chunk_partition[min(index, len(self.chunk_partition) - 1)]

    def chunk_frames(self, index: int) -> int:
        """Frames of a chunk, decoded and cut off at the video's end."""
        return self._frames_before(index + 1) - self._frames_before(index)

    def cut(self, index: int, latents: torch.Tensor) -> torch.Tensor:
        """A chunk's latents, (B, C, frames, H, W), up to the video's end."""
        if self.has_chunk(index + 1):
            return latents
        num_before = sum(self.chunk_partition[:-1])
        return latents[:, :, : count_latent_frames(self.num_frames, self.temporal_factor) - num_before]

    def frames_beyond(self, index: int) -> int:
        """Frames beyond the video's end that a chunk's latents decode to, once `cut` has cut them."""
        return 0 if self.has_chunk(index + 1) else -(self.num_frames - 1) % self.temporal_factor

    def _frames_before(self, index: int) -> int:
        repeated = max(index - len(self.chunk_partition), 0)
        num_latent_frames = sum(self.chunk_partition[:index]) + repeated * self.chunk_partition[-1]
        num_frames = max((num_latent_frames - 1) * self.temporal_factor + 1, 0)
        return num_frames if self.is_endless else min(num_frames, self.num_frames)


@dataclass(frozen=True)
class Schedule:
    """How a chunk is denoised.

    Args:
        rollout (`str`): one of `ROLLOUTS`.
        num_in_flight (`int`): chunks denoised together.
        num_inference_steps (`int`), sigmas, timesteps: see `set_rollout_timesteps` of a scheduler.
        guidance_scale (`float`): of classifier-free guidance; at most 1 is none.
        first_steps (`int`, *optional*): steps of the first generated chunk, where they differ.
        context_noise (`float`): timestep of the context pass, 0 to 1000.
    """

    rollout: str
    num_in_flight: int
    num_inference_steps: int
    sigmas: Sequence[float] | None
    timesteps: Sequence[float] | None
    guidance_scale: float
    first_steps: int | None = None
    context_noise: float = 0.0

    @property
    def is_one_way(self) -> bool:
        """Whether chunks in flight read only themselves and the cleaner ones before them."""
        return self.rollout == "wave_forcing"

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Inputs:
    """What the videos are made of.

    Args:
        prompts ([`Prompts`]): the prompts of chunk 0.
        prompt_changes (`dict[int, PromptChange]`): the prompts of later chunks.
        prompt_transition (`str`): what happens to the context where a stream's `set_prompt` does not say it.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): random numbers.
        latents (`torch.Tensor`, *optional*): initial noise of all chunks, (B, C, T, H, W).
        video (`torch.Tensor`, *optional*): frames to continue, (videos, T, 3, height, width) in [0, 1].
        video_latents (`torch.Tensor`, *optional*): latent frames to continue, (videos, T, C, H, W).
    """

    prompts: Prompts
    prompt_changes: dict[int, PromptChange]
    prompt_transition: str
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    video: torch.Tensor | None
    video_latents: torch.Tensor | None


@dataclass(frozen=True)
class Callbacks:
    """Functions of the user that a run calls.

    Args:
        on_step_end (`Callable`, *optional*): `on_step_end(pipe, step, timestep, tensors)`, after each denoising step.
        step_tensors (`Sequence[str]`): names of the tensors that `on_step_end` gets.
        renoise (`Callable`, *optional*): `renoise(chunk, step)`, the noise that re-noises a chunk.
        on_chunk (`Callable`, *optional*): `on_chunk(index, latents, decisions)`, after each generated chunk.
    """

    on_step_end: Callable | None
    step_tensors: Sequence[str]
    renoise: Callable | None
    on_chunk: Callable | None


@dataclass(frozen=True)
class RolloutPlan:
    """What one call does, completed from the checkpoint and checked.

    Args:
        sizes ([`Sizes`]), schedule ([`Schedule`]), inputs ([`Inputs`]), callbacks ([`Callbacks`]): see there.
        method ([`Method`]): what is done against drift.
        layout ([`Layout`]): which past frames a pass reads, and where they stand.
        options ([`BackboneOptions`]): what the backbone is passed.
        output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
    """

    sizes: Sizes
    schedule: Schedule
    inputs: Inputs
    callbacks: Callbacks
    method: Method
    layout: Layout
    options: BackboneOptions
    output_type: str

    @property
    def decodes(self) -> bool:
        return self.output_type != "latent"

    def count_steps(self, steps_per_chunk: int, first_chunk: int = 0) -> float:
        """Denoising steps of the run from a chunk on, without regenerations."""
        if self.sizes.is_endless:
            return math.inf
        first_generated, first_steps = self.sizes.num_given_chunks, self.schedule.first_steps
        num_chunks = len(self.sizes.chunk_partition) - max(first_chunk, first_generated)
        if self.schedule.num_in_flight > 1:
            return num_chunks - 1 + steps_per_chunk
        has_first = first_steps is not None and first_chunk <= first_generated and num_chunks > 0
        return num_chunks * steps_per_chunk + (first_steps - steps_per_chunk if has_first else 0)
