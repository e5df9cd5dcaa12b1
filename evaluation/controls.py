# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Controls: something else in the place of a method's remedy, one method overridden in each."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from diffusers.utils.torch_utils import randn_tensor

from tokentrim import TokenTrimPipeline, pipeline_tokentrim
from tokentrim.tokentrim_anchor import MatchDistribution
from tokentrim.tokentrim_policy import TokenTrimPolicy


class _Replaced(TokenTrimPolicy):
    """Evicts other tokens than the most changed ones."""

    def review(self, previous, attempt):
        condemned = super().review(previous, attempt)
        for video, tokens in condemned.items():
            decision = self._decisions[video]
            condemned[video] = self.replace(torch.tensor(decision.drift), len(tokens))
            decision.tokens = sorted(condemned[video])
        return condemned


class RandomTokens(_Replaced):
    """As many tokens, anywhere."""

    def replace(self, drift: torch.Tensor, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._decisions[0].chunk)
        return torch.randperm(len(drift), generator=generator)[:count].tolist()


class LowestDrift(_Replaced):
    """The tokens that changed least."""

    def replace(self, drift: torch.Tensor, count: int) -> list[int]:
        return drift.argsort()[:count].tolist()


class NoTokens(_Replaced):
    """None: the chunk is generated again on the same context from other noise."""

    def replace(self, drift: torch.Tensor, count: int) -> list[int]:
        return []


def redraft_with_fresh_noise(self, state, index, draft, videos, redraft=TokenTrimPipeline.redraft_chunk):
    """Another attempt from noise that the first one did not have."""
    noise = state.noise_chunks[index].clone()
    noise[videos] = randn_tensor(noise[videos].shape, generator=torch.Generator().manual_seed(index)).to(noise)
    state.noise_chunks[index] = noise
    return redraft(self, state, index, draft, videos)


def decode_corrected(self, latents, output_type, decode=TokenTrimPipeline.decode_latents):
    """Every chunk held to the first one when the rollout is over, as re-anchoring does before others read it."""
    first, *_ = chunks = latents.split(self.config.num_frames_per_chunk, dim=2)
    match = MatchDistribution(first)
    return decode(self, torch.cat([match(chunk) for chunk in chunks], dim=2), output_type)


_POLICY = (pipeline_tokentrim, "TokenTrimPolicy")
_FRESH = (TokenTrimPipeline, "redraft_chunk", redraft_with_fresh_noise)
CONTROLS = {
    "random_tokens": [(*_POLICY, RandomTokens)],
    "lowest_drift": [(*_POLICY, LowestDrift)],
    "fresh_noise": [_FRESH],
    "fresh_noise_no_pruning": [(*_POLICY, NoTokens), _FRESH],
    "corrected_afterwards": [(TokenTrimPipeline, "decode_latents", decode_corrected)],
}


@contextmanager
def controlled(name: str | None) -> Iterator[None]:
    """Rollouts inside run with the control in place."""
    patches = [patch.object(*each) for each in CONTROLS.get(name, [])]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
