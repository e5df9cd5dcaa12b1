# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The values that attempts at a chunk are made of."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InFlight:
    """A chunk in flight: latents (B, C, frames, H, W) after `step` denoising steps."""

    latents: torch.Tensor
    step: int = 0

    @property
    def num_frames(self) -> int:
        return self.latents.shape[2]


@dataclass(frozen=True)
class Draft:
    """An attempt at a chunk.

    Args:
        index (`int`): index of the chunk.
        before (`tuple[InFlight, ...]`): the chunks in flight before the attempt, this one first if it was among them.
        after (`tuple[InFlight, ...]`): the chunks in flight after it, this one first.
        judged (`torch.Tensor`): what policies review, (B, C, frames, H, W).
        first_flow (`torch.Tensor`, *optional*):
            flow of the first step, if policies review the x0 prediction of that step.
    """

    index: int
    before: tuple[InFlight, ...]
    after: tuple[InFlight, ...]
    judged: torch.Tensor
    first_flow: torch.Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Some videos of the batch; `None`: all."""

    videos: list[int] | None = None

    def of(self, batch: torch.Tensor) -> torch.Tensor:
        return batch if self.videos is None else batch[self.videos]

    def within(self, batch: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A copy of the batch with these rows."""
        batch = batch.clone()
        batch[self.videos] = rows
        return batch
