# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Candidate matchings for latents with texture. Research code: called like those of `tokentrim_policies/matching.py`."""

import torch

from tokentrim.tokentrim_policies.matching import MatchNear, smooth


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
