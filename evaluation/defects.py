# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Defects painted into the latents of an accepted chunk, before it becomes context."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from tokentrim import TokenTrimPipeline


def local_patch(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square of a quarter of the width in one wrong value of each channel."""
    side = chunk.shape[-1] // 4
    y, x = torch.randint(chunk.shape[-1] - side, (2,), generator=generator).tolist()
    chunk[..., y : y + side, x : x + side] = 2 * torch.randn(len(chunk), 1, 1, 1, generator=generator)
    return chunk


def half_frame(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The left half in another colour."""
    half = chunk.shape[-1] // 2
    chunk[..., :half] += 1.5 * torch.randn(len(chunk), 1, 1, 1, generator=generator)
    return chunk


def doubled_object(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The busier half of the frame repeated in the other."""
    half = chunk.shape[-1] // 2
    left, right = chunk[..., :half], chunk[..., -half:]
    busy, quiet = (left, right) if left.std() > right.std() else (right, left)
    quiet.copy_(busy)
    return chunk


def noise_region(chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise in a square of half the width."""
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


@contextmanager
def painted(kinds: list[str | None], seeds: list[int], at_chunk: int) -> Iterator[None]:
    """Rollouts inside accept chunk `at_chunk` with a defect of `kinds[video]` in it, the same for a seed."""
    finish = TokenTrimPipeline.finish_chunk

    def finish_chunk(self, state, index):
        chunk = finish(self, state, index)
        if index == at_chunk:
            for video, (kind, seed) in enumerate(zip(kinds, seeds)):
                if kind is not None:  # in place: it is what the next chunk is compared with, too
                    DEFECTS[kind](chunk[video], torch.Generator().manual_seed(seed))
        return chunk

    with patch.object(TokenTrimPipeline, "finish_chunk", finish_chunk):
        yield
