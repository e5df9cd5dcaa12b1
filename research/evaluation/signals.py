# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Drift signals: values of each chunk of latents that a gate could use, for comparison with the true error."""

from collections.abc import Callable

import torch

from tokentrim.tokentrim_policies.outliers import jump, magnitude, mean_offsets, quantiles
from tokentrim.tokentrim_policies.stability import severity, summarize, token_drift, unstable_tokens


def _summaries(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> list[torch.Tensor]:
    return [summarize(chunk, patch_size) for chunk in latents]


def _over_pairs(measure: Callable, latents: list[torch.Tensor], references: list[torch.Tensor]) -> torch.Tensor:
    """Apply a measure of two chunks to each video and pair, (B, chunks)."""
    pairs = [list(zip(chunk, reference)) for chunk, reference in zip(latents, references)]
    return torch.tensor([[measure(*pair) for pair in chunk_pairs] for chunk_pairs in pairs]).T


def paper_severity(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """D_t of the paper with p = 0.1: mean drift of the tenth of tokens that moved most since the chunk before (eq. 6)."""
    summaries = _summaries(latents, patch_size)
    drifts = [token_drift(now, before) for now, before in zip(summaries, [summaries[0], *summaries])]
    return torch.stack([severity(drift, unstable_tokens(drift, 0.1)) for drift in drifts], dim=1)


def reference_severity(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """The same, since the first chunk."""
    first, *_ = summaries = _summaries(latents, patch_size)
    drifts = [token_drift(now, first) for now in summaries]
    return torch.stack([severity(drift, unstable_tokens(drift, 0.1)) for drift in drifts], dim=1)


def reference_median(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """The median token's distance to the first chunk."""
    first, *_ = summaries = _summaries(latents, patch_size)
    return torch.stack([token_drift(now, first).median(dim=-1).values for now in summaries], dim=1)


def previous_median(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """The median token's distance to the chunk before."""
    summaries = _summaries(latents, patch_size)
    pairs = zip(summaries, [summaries[0], *summaries])
    return torch.stack([token_drift(now, before).median(dim=-1).values for now, before in pairs], dim=1)


def nearest_reference(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Mean distance of the tenth of tokens that are farthest from their nearest token of the first chunk, at any place,
    after the chunk's mean offset is removed."""
    first = summarize(latents[0], patch_size)
    values = []
    for chunk in latents:
        now = summarize(chunk, patch_size)
        now = now - now.mean(dim=1, keepdim=True) + first.mean(dim=1, keepdim=True)
        distance = torch.cdist(now, first).min(dim=-1).values
        values.append(severity(distance, unstable_tokens(distance, 0.1)))
    return torch.stack(values, dim=1)


def previous_jump(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Quarantine's signal: distance of the value distributions to the chunk before."""
    first, *_ = values = [quantiles(chunk) for chunk in latents]
    return _over_pairs(jump, values, [first, *values])


def reference_offset(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Re-anchoring's signal: distance of the channel means to the first chunk's, in its standard deviations."""
    return _over_pairs(lambda *pair: magnitude(mean_offsets(*pair)), latents, [latents[0]] * len(latents))


def reference_jump(latents: list[torch.Tensor], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Distance of the value distributions to the first chunk."""
    first, *_ = values = [quantiles(chunk) for chunk in latents]
    return _over_pairs(jump, values, [first] * len(values))


SIGNALS = {
    each.__name__: each
    for each in (
        paper_severity,
        previous_median,
        previous_jump,
        reference_severity,
        reference_median,
        reference_offset,
        reference_jump,
        nearest_reference,
    )
}
