# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Re-anchoring at commit, ours and not the paper's: what becomes context is held to the first chunk's statistics.

Drift of a long rollout is mostly slow and global: every chunk is a little off the one before it, is read back, and is
taken for the truth. Moving the statistics of what is read back to those of the first chunk breaks that loop. The
chunk that is shown stays as it was generated.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch


SPACE = (-3, -2, -1)  # the dimensions T, H, W


class MatchMean:
    """Gives latents the reference's mean in each channel; both are (..., C, T, H, W), of any T."""

    def __init__(self, reference: torch.Tensor):
        self.mean = reference.mean(SPACE, keepdim=True)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return latents - latents.mean(SPACE, keepdim=True) + self.mean


class MatchMoments:
    """Gives latents the reference's mean and standard deviation in each channel, as AdaIN (arXiv 1703.06868)."""

    def __init__(self, reference: torch.Tensor):
        self.mean, self.std = reference.mean(SPACE, keepdim=True), reference.std(SPACE, keepdim=True)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        spread = self.std / latents.std(SPACE, keepdim=True).clamp_min(1e-6)
        return (latents - latents.mean(SPACE, keepdim=True)) * spread + self.mean


def quantiles(latents: torch.Tensor) -> torch.Tensor:
    """The values of each channel in ascending order, (..., C, T, H, W) -> (..., C, T * H * W)."""
    return latents.flatten(-3).sort(dim=-1).values


def resampled(values: torch.Tensor, count: int) -> torch.Tensor:
    """Quantiles, (..., any), of a chunk with `count` values in each channel."""
    if values.shape[-1] == count:
        return values
    flat = values.flatten(0, -2)[None]
    return torch.nn.functional.interpolate(flat, count, mode="linear", align_corners=True).view(*values.shape[:-1], -1)


class MatchHistogram:
    """Gives latents the reference's distribution of values in each channel: the n-th smallest becomes its n-th."""

    def __init__(self, reference: torch.Tensor):
        self.quantiles = quantiles(reference)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        order = latents.flatten(-3).argsort(dim=-1)
        values = resampled(self.quantiles, order.shape[-1])
        return torch.empty_like(values).scatter_(-1, order, values).view_as(latents)


def turned(latents: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Latents, (..., C, T, H, W), with `basis`, (C, C), applied to their channels."""
    return (basis @ latents.flatten(-3)).view_as(latents)


class MatchDistribution:
    """Gives latents the reference's joint distribution over channels: histograms matched along the axes of one random
    basis after the other (iterative distribution transfer, Pitie et al., ICCV 2005)."""

    def __init__(self, reference: torch.Tensor, num_bases: int = 12):
        num_channels, generator = reference.shape[-4], torch.Generator().manual_seed(0)
        bases = torch.randn(num_bases, num_channels, num_channels, generator=generator)
        self.bases = torch.linalg.qr(bases).Q.to(reference)
        self.histograms = [MatchHistogram(turned(reference, basis)) for basis in self.bases]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        for basis, histogram in zip(self.bases, self.histograms):
            latents = turned(histogram(turned(latents, basis)), basis.T)
        return latents


REANCHORINGS = {
    "mean": MatchMean,
    "moments": MatchMoments,
    "histogram": MatchHistogram,
    "distribution": MatchDistribution,
}


def offset(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Distance of the channels' means, in standard deviations of the reference, root mean square over channels."""
    values, of_reference = latents.flatten(1), reference.flatten(1)
    distance = (values.mean(1) - of_reference.mean(1)) / of_reference.std(1).clamp_min(1e-6)
    return distance.square().mean().sqrt().item()


@dataclass
class _Video:
    """What one video is held to, and how it has taken that lately."""

    reference: torch.Tensor  # (C, T, H, W)
    free: bool = False
    offsets: list[float] = field(default_factory=list)  # of the chunks since it was held or let go


class Anchor:
    """What each video of a batch is held to: its first chunk, unless a change is meant.

    Without a tolerance all chunks are held. With one, a change is expected, and a video is watched first: a chunk that
    leaves the tolerance is the next anchor, and what stays within it for `patience` chunks is held from then on. A held
    chunk starts from context at the anchor, so its offset from there is how hard the model pulls away: where the median
    of `patience` chunks leaves the tolerance, the video is let go and watched again.

    Args:
        reanchor (`str`, *optional*): which statistics, one of `REANCHORINGS`; `None` leaves every chunk as it is.
        tolerance (`float`, *optional*): the `offset` that is taken for meant; `None`: none is.
        patience (`int`): chunks that a video is watched before it is held or let go.
    """

    def __init__(self, reanchor: str | None = None, tolerance: float | None = None, patience: int = 6):
        self.learn = REANCHORINGS.get(reanchor)
        self.tolerance = math.inf if tolerance is None else tolerance
        self.patience = patience
        self.videos: list[_Video] = []
        self.matches: list[tuple[list[int], Callable]] | None = None  # which videos are held, and how

    def start(self, chunk: torch.Tensor) -> None:
        """Hold later chunks to this one, (B, C, T, H, W): the first one, or the last that was given."""
        if self.learn is not None:
            self.videos = [_Video(latents, free=self.tolerance < math.inf) for latents in chunk]

    def let_go(self) -> None:
        """What is asked for has changed: watch every video before it is held again."""
        for video in self.videos:
            video.free, video.offsets = True, []
        self.matches = None

    def hold(self, chunk: torch.Tensor, broken: Collection[int] = ()) -> torch.Tensor:
        """What becomes context in the place of an accepted chunk, (B, C, T, H, W).

        Args:
            chunk (`torch.Tensor`): accepted latents.
            broken (`Collection[int]`): videos whose chunk is a defect, which is never meant.
        """
        if self.learn is None:
            return chunk
        if not self.videos:
            self.start(chunk)
            return chunk
        for index, latents in enumerate(chunk):
            if index not in broken:
                self._watch(index, latents)
        if self.matches is None:
            self.matches = self._learn_held()
        context = chunk.clone()
        for held, match in self.matches:
            context[held] = match(chunk[held])
        return context

    def _watch(self, index: int, latents: torch.Tensor) -> None:
        """Move the anchor of a video, let it go, or hold it again."""
        video = self.videos[index]
        if not video.free and self.tolerance == math.inf:
            return
        video.offsets = [*video.offsets, offset(latents, video.reference)][-self.patience :]
        long_enough = len(video.offsets) == self.patience
        if video.free and video.offsets[-1] > self.tolerance:  # it moves
            self.videos[index] = _Video(latents, free=True)
        elif video.free and long_enough:  # it has settled; without a tolerance nobody knows since when
            self.videos[index] = _Video(video.reference if self.tolerance < math.inf else latents)
            self.matches = None
        elif long_enough and statistics.median(video.offsets) > self.tolerance:  # it insists
            self.videos[index] = _Video(latents, free=True)
            self.matches = None

    def _learn_held(self) -> list[tuple[list[int], Callable]]:
        """The videos that are held, together where their anchors are of one length, with what they are matched to."""
        by_length = defaultdict(list)
        for index, video in enumerate(self.videos):
            if not video.free:
                by_length[video.reference.shape[1]].append(index)
        return [
            (held, self.learn(torch.stack([self.videos[i].reference for i in held]))) for held in by_length.values()
        ]
