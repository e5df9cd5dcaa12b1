# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Controls: a method with another remedy."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from tokentrim import TokenTrim
from tokentrim.tokentrim_policies.matching import MatchDistribution
from tokentrim.tokentrim_session.arguments import TRIM_SETTINGS


class _OtherTokens(TokenTrim):
    """TokenTrim that evicts tokens other than those that changed most."""

    def review(self, draft: torch.Tensor) -> list[int]:
        tokens = super().review(draft)
        return self.choose(self._drift, len(tokens)) if tokens else tokens


class RandomTokens(_OtherTokens):
    """The same number of tokens, drawn at random."""

    def choose(self, drift: torch.Tensor, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(len(self.severities) + 1)  # the chunk's index
        return torch.randperm(len(drift), generator=generator)[:count].tolist()


class LowestDrift(_OtherTokens):
    """The tokens that changed least."""

    def choose(self, drift: torch.Tensor, count: int) -> list[int]:
        return drift.argsort()[:count].tolist()


class FreshNoise:
    """A hook of the denoiser: another attempt starts from fresh noise."""

    def __init__(self):
        self.chunk: int | None = None  # the chunk that started last

    def guides(self, generated_chunk: int, step: int, num_steps: int) -> bool:
        starts = step == 0
        again = starts and generated_chunk == self.chunk
        self.chunk = generated_chunk if starts else self.chunk
        return again

    def __call__(self, latents: torch.Tensor, predict_x0, transformer) -> torch.Tensor:
        return randn_tensor(latents.shape, generator=torch.Generator().manual_seed(self.chunk)).to(latents)


class SameContext(TokenTrim):
    """TokenTrim that evicts nothing: another attempt reads the same context."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.prune_weight = 1.0


def correct_afterwards(latents: torch.Tensor, num_frames_per_chunk: int) -> torch.Tensor:
    """Re-anchor every chunk of (B, C, T, H, W) to the first one after the rollout, not during it."""
    first, *_ = chunks = latents.split(num_frames_per_chunk, dim=2)
    match = MatchDistribution(first)
    return torch.cat([match(chunk) for chunk in chunks], dim=2)


def correct_in_pixels(frames: np.ndarray, num_frames_per_chunk: int) -> np.ndarray:
    """Give every frame of videos, (videos, frames, H, W, 3) in [0, 1], the colors of the first chunk's middle frame, as
    users correct a finished video: the linear Monge-Kantorovich map of PyPI's color-matcher."""
    from color_matcher import ColorMatcher

    transfer, middle = ColorMatcher().transfer, num_frames_per_chunk // 2
    corrected = [[transfer(src=frame, ref=video[middle], method="mkl") for frame in video] for video in frames]
    return np.clip(corrected, 0, 1).astype(frames.dtype)


def _other_policy(kind: type, *hooks: Callable) -> Callable:
    def change(arguments: dict) -> dict:
        settings = {name: value for name, value in arguments.items() if name in TRIM_SETTINGS}
        rest = {name: value for name, value in arguments.items() if name not in settings}
        method = arguments.get("method")
        if isinstance(method, dict):  # settings of TokenTrim that are no arguments of the call
            settings |= method["tokentrim"]
        return {**rest, "method": [*(hook() for hook in hooks), kind(**settings)]}

    return change


# Controls that replace arguments of a call.
OTHER_POLICIES: dict[str, Callable] = {
    "random_tokens": _other_policy(RandomTokens),
    "lowest_drift": _other_policy(LowestDrift),
    "fresh_noise": _other_policy(TokenTrim, FreshNoise),
    "fresh_noise_no_pruning": _other_policy(SameContext, FreshNoise),
}
# Controls that run after a rollout, on its latents or on its frames.
LATENT_CORRECTIONS: dict[str, Callable] = {"corrected_afterwards": correct_afterwards}
PIXEL_CORRECTIONS: dict[str, Callable] = {"corrected_in_pixels": correct_in_pixels}
CONTROLS = (*OTHER_POLICIES, *LATENT_CORRECTIONS, *PIXEL_CORRECTIONS)
