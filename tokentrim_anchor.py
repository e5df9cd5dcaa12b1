# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Re-anchoring at commit, ours and not the paper's: what becomes context is held to the first chunk's statistics.

Drift of a long rollout is mostly slow and global: every chunk is a little off the one before it, is read back, and is
taken for the truth. Moving the statistics of what is read back to those of the first chunk breaks that loop. The
chunk that is shown stays as it was generated.
"""

import math
from collections.abc import Collection

import torch


def match_mean(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Latents with the reference's mean in each channel, both (..., C, T, H, W)."""
    values, of_reference = latents.flatten(-3), reference.flatten(-3)
    return (values - values.mean(-1, keepdim=True) + of_reference.mean(-1, keepdim=True)).view_as(latents)


def match_moments(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Latents with the reference's mean and standard deviation in each channel, as AdaIN (arXiv 1703.06868)."""
    values, of_reference = latents.flatten(-3), reference.flatten(-3)
    spread = of_reference.std(-1, keepdim=True) / values.std(-1, keepdim=True).clamp_min(1e-6)
    centred = (values - values.mean(-1, keepdim=True)) * spread
    return (centred + of_reference.mean(-1, keepdim=True)).view_as(latents)


def quantiles(latents: torch.Tensor, count: int) -> torch.Tensor:
    """The values of each channel in ascending order, `count` of them: (..., C, T, H, W) -> (..., C, count)."""
    values = latents.flatten(-3).sort(dim=-1).values
    if values.shape[-1] == count:
        return values
    flat = values.flatten(0, -2)[None]
    return torch.nn.functional.interpolate(flat, count, mode="linear", align_corners=True).view(*values.shape[:-1], -1)


def match_histogram(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Latents with the reference's distribution of values in each channel: the n-th smallest becomes the n-th smallest."""
    order = latents.flatten(-3).argsort(dim=-1)
    values = quantiles(reference, order.shape[-1])
    return torch.empty_like(values).scatter_(-1, order, values).view_as(latents)


def match_distribution(latents: torch.Tensor, reference: torch.Tensor, num_rotations: int = 12) -> torch.Tensor:
    """Latents with the reference's joint distribution over channels: histograms matched along the axes of one random
    basis after the other (iterative distribution transfer, Pitie et al., ICCV 2005)."""
    generator, num_channels = torch.Generator().manual_seed(0), latents.shape[-4]
    bases = torch.linalg.qr(torch.randn(num_rotations, num_channels, num_channels, generator=generator)).Q.to(latents)
    for basis in bases:
        turned = (torch.einsum("ij,...jthw->...ithw", basis, each) for each in (latents, reference))
        latents = torch.einsum("ji,...jthw->...ithw", basis, match_histogram(*turned))
    return latents


REANCHORINGS = {
    "mean": match_mean,
    "moments": match_moments,
    "histogram": match_histogram,
    "distribution": match_distribution,
}


def offset(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Distance of the channels' means, in standard deviations of the reference, root mean square over channels."""
    values, of_reference = latents.flatten(1), reference.flatten(1)
    distance = (values.mean(1) - of_reference.mean(1)) / of_reference.std(1).clamp_min(1e-6)
    return distance.square().mean().sqrt().item()


class Anchor:
    """What each video of a batch is held to: its first chunk, unless it soon goes far enough away to be meant.

    Drift is slow, a change that the prompt asks for is not: so the chunks after an anchor are watched first. If one
    leaves the tolerance, it is the next anchor; if none does, the chunks after them are held, for good.

    Args:
        reanchor (`str`, *optional*): which statistics, one of `REANCHORINGS`; `None` leaves every chunk as it is.
        warmup_chunks (`int`): chunks after an anchor that are watched and not held.
        tolerance (`float`, *optional*): the `offset` of a watched chunk that is taken for meant; `None`: nothing is.
    """

    def __init__(self, reanchor: str | None = None, warmup_chunks: int = 0, tolerance: float | None = None):
        self.match = REANCHORINGS.get(reanchor)
        self.tolerance = math.inf if tolerance is None else tolerance
        self.warmup_chunks = warmup_chunks
        self.references: list[torch.Tensor] | None = None  # each (C, T, H, W)
        self.ages: list[int] = []  # chunks since then, of each video

    def start(self, chunk: torch.Tensor) -> None:
        """Hold later chunks to this one, (B, C, T, H, W): the first one, or the last that was given."""
        self.references, self.ages = list(chunk), [0] * len(chunk)

    def watch(self) -> None:
        """Watch again before holding: what is asked for may have changed."""
        self.ages = [0] * len(self.ages)

    def hold(self, chunk: torch.Tensor, broken: Collection[int] = ()) -> torch.Tensor:
        """What becomes context in the place of an accepted chunk, (B, C, T, H, W).

        Args:
            chunk (`torch.Tensor`): accepted latents.
            broken (`Collection[int]`): videos whose chunk is a defect, which is never meant.
        """
        if self.match is None:
            return chunk
        if self.references is None:
            self.start(chunk)
            return chunk
        held = []
        for video, latents in enumerate(chunk):
            self.ages[video] += 1
            if self.ages[video] > self.warmup_chunks:
                held.append(video)
            elif video not in broken and offset(latents, self.references[video]) > self.tolerance:
                self.references[video], self.ages[video] = latents, 0
        if held:
            chunk = chunk.clone()
            chunk[held] = self.match(chunk[held], torch.stack([self.references[video] for video in held]))
        return chunk
