# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Matchings: learned from a reference chunk, they move latents to its values. Latents are (..., C, T, H, W)."""

import math

import torch
import torch.nn.functional as F

from .outliers import SPACE, quantiles


MAX_NEIGHBORS = 1024  # tokens that a density is estimated from


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


def quantile_means(latents: torch.Tensor, count: int) -> torch.Tensor:
    """The values of each channel in ascending order, averaged in `count` equal shares, (..., C, T, H, W) -> (..., C, count)."""
    values = quantiles(latents)
    flat = F.adaptive_avg_pool1d(values.flatten(0, -2)[None], count)
    return flat.view(*values.shape[:-1], count)


class MatchHistogram:
    """Gives latents the reference's values in each channel, smoothly: optimal transport of its quantiles, averaged over
    near values.

    A map by ranks separates nearly equal values, which adds noise to flat areas and makes a rollout depend on rounding.
    Here each value moves by the mean move of the quantiles near it, so the map has a bounded slope.

    Args:
        reference (`torch.Tensor`): (..., C, T, H, W).
        num_quantiles (`int`): shares of the values whose means are moved.
        width (`float`): standard deviation of the Gaussian of near values, in standard deviations of the reference.
    """

    def __init__(self, reference: torch.Tensor, num_quantiles: int = 32, width: float = 0.15):
        self.mean, self.std = reference.mean(SPACE, keepdim=True), reference.std(SPACE, keepdim=True).clamp_min(1e-6)
        self.quantiles = quantile_means(self._standardized(reference), num_quantiles)
        # Moves are computed at these values, and interpolated between them.
        self.grid = torch.arange(-5, 5, width / 1.5, dtype=torch.float32).to(reference)
        self.width = width

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        values = self._standardized(latents)
        sources = quantile_means(values, self.quantiles.shape[-1])
        distances = (self.grid[:, None] - sources[..., None, :]) / self.width
        weights = torch.softmax(-distances.square() / 2, dim=-1)  # (..., C, grid, quantiles)
        moves = (weights @ (self.quantiles - sources)[..., None])[..., 0]
        return latents + self._at(values, moves) * self.std

    def _standardized(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self.mean) / self.std

    def _at(self, values: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
        """The moves, (..., C, grid), of values, (..., C, T, H, W), linear between the points of the grid."""
        places = (values.flatten(-3) - self.grid[0]) / (self.grid[1] - self.grid[0])
        places = places.clamp(0, len(self.grid) - 1.001)
        left = places.long()
        return torch.lerp(moves.gather(-1, left), moves.gather(-1, left + 1), places - left).view_as(values)


def in_basis(latents: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Latents, (..., C, T, H, W), with `basis`, (C, C), applied to their channels."""
    return (basis @ latents.flatten(-3)).view_as(latents)


class MatchDistribution:
    """Gives latents the reference's joint distribution over channels: histograms matched along the axes of one random
    basis after the other (iterative distribution transfer, Pitie et al., ICCV 2005)."""

    def __init__(self, reference: torch.Tensor, num_bases: int = 12):
        num_channels, generator = reference.shape[-4], torch.Generator().manual_seed(0)
        bases = torch.randn(num_bases, num_channels, num_channels, generator=generator, dtype=torch.float32)
        self.bases = torch.linalg.qr(bases).Q.to(reference)
        self.histograms = [MatchHistogram(in_basis(reference, basis)) for basis in self.bases]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        for basis, histogram in zip(self.bases, self.histograms):
            latents = in_basis(histogram(in_basis(latents, basis)), basis.T)
        return latents


class MatchCovariance:
    """Gives latents the reference's means and covariance of channels by the least motion: the linear Monge-Kantorovich
    map, T = S^-1/2 (S^1/2 R S^1/2)^1/2 S^-1/2 for covariances S and R, which is symmetric (Pitie and Kokaram, CVMP 2007).
    """

    def __init__(self, reference: torch.Tensor):
        self.mean, self.covariance = self.moments(reference)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        mean, covariance = self.moments(latents)
        root, inverse = symmetric_power(covariance, 0.5), symmetric_power(covariance, -0.5)
        transport = inverse @ symmetric_power(root @ self.covariance @ root, 0.5) @ inverse
        moved = transport.to(latents) @ (latents.flatten(-3) - mean.to(latents)) + self.mean.to(latents)
        return moved.view_as(latents)

    @staticmethod
    def moments(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (..., C, 1) and covariance (..., C, C) of the channels, in float64."""
        values = latents.flatten(-3).cpu().double()
        mean = values.mean(dim=-1, keepdim=True)
        return mean, (values - mean) @ (values - mean).mT / values.shape[-1]


def as_tokens(latents: torch.Tensor) -> torch.Tensor:
    """The values of each place in all channels, (..., C, T, H, W) -> (..., T * H * W, C)."""
    return latents.flatten(-3).mT


def draw_tokens(tokens: torch.Tensor, count: int = MAX_NEIGHBORS) -> torch.Tensor:
    """At most `count` of the tokens, (..., any, C), evenly spaced: enough to estimate a density."""
    return tokens[..., :: -(-tokens.shape[-2] // count), :]


def nearness(tokens: torch.Tensor, others: torch.Tensor, width: float) -> torch.Tensor:
    """Logarithm of a Gaussian of each distance, (..., tokens, others). `width` is its standard deviation, root mean square
    over channels."""
    return torch.cdist(tokens, others).square_().mul_(-0.5 / (tokens.shape[-1] * width**2))


def neighborhoods(
    tokens: torch.Tensor, some: torch.Tensor, reference: torch.Tensor, width: float, rare: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two mean shifts of tokens, (..., tokens, C): to `some` of themselves and to a reference.

    Returns:
        `tuple`: the mean of each neighborhood in the reference, times its share; the same of that among the tokens; and the
        share, (..., tokens, 1): near 0 where the reference has no neighbors, and a half for `rare` of its tokens.
    """
    ours = nearness(tokens, some, width).softmax(dim=-1) @ some
    # A constant "no neighbor" entry keeps isolated tokens in place.
    none = math.log(rare * reference.shape[-2])
    weights = F.pad(nearness(tokens, reference, width), (0, 1), value=none).softmax(dim=-1)
    share = 1 - weights[..., -1:]
    return weights[..., :-1] @ reference, share * ours, share


class MatchNear:
    """Moves values that resemble the reference back to it; values without a counterpart stay.

    A token of the latents, its values in all channels, moves from its neighborhood in the chunk to its neighborhood in the
    reference: by the difference of two mean shifts (Comaniciu and Meer, PAMI 2002), which follow
    the gradients of the two log densities. Unlike in the other matchings, the number of near tokens does not matter:
    a sky keeps its blue while a meadow enters the picture.

    Args:
        reference (`torch.Tensor`): (..., C, T, H, W).
        width (`float`): standard deviation of the Gaussian of near tokens, root mean square over channels, in
            latents without further scaling: VAEs have a scale that gives them a standard deviation of 1.
        num_steps (`int`): moves of each token.
        rare (`float`): a token whose neighbors are this share of the reference moves half as far.
    """

    def __init__(self, reference: torch.Tensor, width: float = 0.1, num_steps: int = 3, rare: float = 0.003):
        self.width = width
        self.num_steps = num_steps
        self.rare = rare
        self.reference = draw_tokens(as_tokens(reference))

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = as_tokens(latents)
        for _ in range(self.num_steps):
            theirs, ours, _ = neighborhoods(tokens, draw_tokens(tokens), self.reference, self.width, self.rare)
            tokens = tokens + theirs - ours
        return tokens.mT.reshape(latents.shape)


def smooth(latents: torch.Tensor, size: int) -> torch.Tensor:
    """Averages over `size` by `size` places, (..., C, T, H, W); at the borders over those that exist."""
    flat = latents.flatten(0, -3)[None]
    return F.avg_pool2d(flat, size, 1, size // 2, count_include_pad=False).view_as(latents)


class MatchShift:
    """Moves the whole chunk by one offset of each channel, the one that its averages need, and then as [`MatchNear`].

    Drift is smooth over the picture and texture is not: averages over `size` by `size` places keep the drift and lose the
    texture, in which single places have no neighbors. Each average moves from its neighborhood in the chunk to its
    neighborhood in the reference, and counts by the share of it that the reference has, so new content has no say. The
    offset is the weighted least-squares fit to these moves. New content moves too, but only by what the rest has drifted.

    Args:
        reference (`torch.Tensor`): (..., C, T, H, W).
        size (`int`, *optional*):
            Places along height and width that are averaged; by default about a fourth of the height, 3 of 16 and 13 of 60. Larger
            averages mix sky and ground.
        width (`float`), rare (`float`): as in [`MatchNear`].
        doubt (`float`): weight of an offset of 0 in the fit, as a share of all averages.
        num_steps (`int`): how often the offset is refined.
        num_tokens (`int`): averages that are looked at.
        near_width (`float`): width of the final [`MatchNear`], which holds what drifts differently from place to place.
    """

    def __init__(
        self,
        reference: torch.Tensor,
        size: int | None = None,
        width: float = 0.1,
        rare: float = 0.003,
        doubt: float = 0.02,
        num_steps: int = 4,
        num_tokens: int = 512,
        near_width: float = 0.08,
    ):
        self.size = max(2 * (reference.shape[-2] // 8) - 1, 1) if size is None else size
        self.width, self.rare, self.doubt = width, rare, doubt
        self.num_steps, self.num_tokens = num_steps, num_tokens
        self.reference = self._averages(reference)
        self.near = MatchNear(reference, near_width, rare=rare)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self._averages(latents)
        offset = torch.zeros_like(tokens[..., :1, :])  # (..., 1, C)
        for _ in range(self.num_steps):
            moved = tokens + offset
            theirs, ours, share = neighborhoods(moved, moved, self.reference, self.width, self.rare)
            weight = share.square().sum(dim=-2, keepdim=True) + self.doubt * tokens.shape[-2]
            offset = offset + (share * (theirs - ours)).sum(dim=-2, keepdim=True) / weight
        return self.near(latents + offset.mT[..., None, None])

    def _averages(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., C, T, H, W) -> (..., tokens, C)."""
        return draw_tokens(as_tokens(smooth(latents, self.size)), self.num_tokens)


def symmetric_power(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """A power of a symmetric positive semidefinite matrix, (..., C, C); eigenvalues of 0 are taken as a small one."""
    eigenvalues, basis = torch.linalg.eigh(matrix)
    return basis @ (eigenvalues.clamp_min(1e-12).pow(power)[..., None] * basis.mT)


MATCHINGS = {
    "mean": MatchMean,
    "moments": MatchMoments,
    "histogram": MatchHistogram,
    "distribution": MatchDistribution,
    "covariance": MatchCovariance,
    "near": MatchNear,
    "shift": MatchShift,
}
