# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Defects painted into the latents of an accepted chunk, before it becomes context: a policy, first in its chain."""

from collections.abc import Callable

import torch

from tokentrim import ContextPolicy


def local_patch(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square of a quarter of the width, filled with one wrong value per channel."""
    side = chunk.shape[-1] // 4
    y, x = torch.randint(chunk.shape[-1] - side, (2,), generator=generator).tolist()
    chunk[..., y : y + side, x : x + side] = 2 * torch.randn(len(chunk), 1, 1, 1, generator=generator)
    return chunk


def half_frame(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The left half in another color."""
    half = chunk.shape[-1] // 2
    chunk[..., :half] += 1.5 * torch.randn(len(chunk), 1, 1, 1, generator=generator)
    return chunk


def doubled_object(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The busier half of the frame, repeated in the other half."""
    half = chunk.shape[-1] // 2
    left, right = chunk[..., :half], chunk[..., -half:]
    busy, quiet = (left, right) if left.std() > right.std() else (right, left)
    quiet.copy_(busy)
    return chunk


def noise_region(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square of half the width, filled with noise."""
    side = chunk.shape[-1] // 2
    y, x = torch.randint(chunk.shape[-1] - side, (2,), generator=generator).tolist()
    region = chunk[..., y : y + side, x : x + side]
    region += 1.5 * torch.randn(region.shape, generator=generator)
    return chunk


DEFECTS: dict[str, Callable] = {
    "local_patch": local_patch,
    "half_frame": half_frame,
    "doubled_object": doubled_object,
    "noise_region": noise_region,
}


class Painted(ContextPolicy):
    """Paint a defect of kind `kinds[video]` into one accepted chunk before it becomes context; a seed fixes the defect."""

    def __init__(self, kinds: list[str | None], seeds: list[int], at_chunk: int):
        self.kinds = kinds
        self.seeds = seeds
        self.at_chunk = at_chunk
        self.index = 0

    def commit(self, chunk: torch.Tensor) -> torch.Tensor:
        if self.index == self.at_chunk:
            chunk = paint(chunk, self.kinds[self.video], self.seeds[self.video])
        return chunk

    def close(self, entered: bool) -> dict:
        self.index += 1
        return {}


def paint(chunk: torch.Tensor, kind: str | None, seed: int) -> torch.Tensor:
    """Copy a chunk, (C, T, H, W), with a defect; `None` adds none."""
    return chunk if kind is None else DEFECTS[kind](chunk.clone(), torch.Generator().manual_seed(seed))


def paint_chunk(latents: torch.Tensor, painted: Painted, num_frames_per_chunk: int) -> torch.Tensor:
    """Paint the defects of the context into the latents of a rollout, (B, C, T, H, W)."""
    chunks = list(latents.split(num_frames_per_chunk, dim=2))
    rows = zip(chunks[painted.at_chunk], painted.kinds, painted.seeds)
    chunks[painted.at_chunk] = torch.stack([paint(*row) for row in rows])
    return torch.cat(chunks, dim=2)
