# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Candidate matchings for latents with texture. Research code: called like those of `tokentrim_policies/matching.py`."""

import math

import torch
import torch.nn.functional as F

from tokentrim.tokentrim_policies.matching import MatchNear


def smooth(latents: torch.Tensor, size: int) -> torch.Tensor:
    """Averages over `size` by `size` places, (..., C, T, H, W); at the borders over those that exist."""
    if size == 1:
        return latents
    flat = latents.flatten(0, -3)[None]
    return F.avg_pool2d(flat, size, 1, size // 2, count_include_pad=False).view_as(latents)


class MatchSmoothNear:
    """`MatchNear` on averages over `size` by `size` places; every place moves by what its average moves.

    Drift is smooth over the picture and texture is not: an average keeps the first and loses most of the second.
    """

    def __init__(self, reference: torch.Tensor, size: int = 7, width: float = 0.1):
        self.size = size
        self.near = MatchNear(smooth(reference, size), width)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        averages = smooth(latents, self.size)
        return latents + self.near(averages) - averages


class MatchCoarseToFine:
    """`MatchSmoothNear` with one size after the other."""

    def __init__(self, reference: torch.Tensor, sizes: tuple[int, ...] = (7, 3, 1), width: float = 0.1):
        self.matchings = [MatchSmoothNear(reference, size, width) for size in sizes]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        for matching in self.matchings:
            latents = matching(latents)
        return latents


def draw_tokens(latents: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` evenly spaced tokens, (..., C, T, H, W) -> (..., tokens, C)."""
    tokens = latents.flatten(-3).mT
    return tokens[..., :: -(-tokens.shape[-2] // count), :]


class MatchCommonShift:
    """Moves all of a chunk by one offset per channel: the one that its averages over `size` by `size` places need.

    Each average moves as in `MatchNear`; the share of its neighborhood that is found in the reference is its weight, so
    new content has no say. The offset is the weighted least-squares fit to these moves, and is refined `num_steps`
    times. `near_width` finishes with `MatchNear` on single places; `None` leaves that out.

    Texture is averaged out, and so is the noise of single matches: an offset does not depend on how fine the picture
    is. New content moves too, but only by what the rest has drifted.

    Args:
        reference (`torch.Tensor`): (..., C, T, H, W).
        size (`int`): places along height and width that are averaged.
        width (`float`): standard deviation of the Gaussian that tells what is near, as in `MatchNear`.
        rare (`float`): as in `MatchNear`.
        doubt (`float`): weight of an offset of 0 in the fit, as a share of all tokens.
        num_steps (`int`): how often the offset is refined.
        num_tokens (`int`): how many averages of a chunk are looked at.
        near_width (`float`, *optional*): width of a final `MatchNear`.
    """

    def __init__(
        self,
        reference: torch.Tensor,
        size: int = 7,
        width: float = 0.1,
        rare: float = 0.003,
        doubt: float = 0.02,
        num_steps: int = 4,
        num_tokens: int = 512,
        near_width: float | None = None,
    ):
        self.size, self.width, self.rare, self.doubt = size, width, rare, doubt
        self.num_steps, self.num_tokens = num_steps, num_tokens
        self.reference = draw_tokens(smooth(reference, size), num_tokens)
        self.near = MatchNear(reference, near_width) if near_width else None

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = draw_tokens(smooth(latents, self.size), self.num_tokens)
        offset = torch.zeros_like(tokens[..., :1, :])  # (..., 1, C)
        for _ in range(self.num_steps):
            moves, share = self._moves(tokens + offset)
            weight = share.square().sum(dim=-2, keepdim=True) + self.doubt * tokens.shape[-2]
            offset = offset + (share * moves).sum(dim=-2, keepdim=True) / weight
        latents = latents + offset.mT[..., None, None]
        return self.near(latents) if self.near else latents

    def _moves(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How far each token moves, (..., tokens, C), and the share of its neighborhood in the reference, (..., tokens, 1)."""
        other = math.log(self.rare * self.reference.shape[-2])
        own = self._nearness(tokens, tokens).softmax(dim=-1) @ tokens
        weights = F.pad(self._nearness(tokens, self.reference), (0, 1), value=other).softmax(dim=-1)
        share = 1 - weights[..., -1:]
        return weights[..., :-1] @ self.reference - share * own, share

    def _nearness(self, tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Logarithm of the Gaussian of each distance, (..., tokens, others)."""
        return torch.cdist(tokens, others).square_().mul_(-0.5 / (tokens.shape[-1] * self.width**2))
