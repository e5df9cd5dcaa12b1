# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Statistics of latents and of severities: thresholds, quantiles, jumps, offsets. Pure functions.

Latents are (..., C, T, H, W). *Values* are all values of a channel, regardless of position.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


SPACE = (-3, -2, -1)  # the dimensions T, H, W


def outlier_threshold(
    values: Sequence[float], sensitivity: float, warmup: int, spread_floor: float = 0.0
) -> float | None:
    """The adaptive threshold mu + lambda sigma (TokenTrim, arXiv 2602.00268, eq. 7, 8) with the population standard
    deviation.

    Args:
        values (`Sequence[float]`): accepted so far.
        sensitivity (`float`): lambda.
        warmup (`int`): values needed before there is a threshold; at least one.
        spread_floor (`float`): lower bound of sigma, as a share of mu; the paper has none.

    Returns:
        `float`, *optional*: `None` during the warm-up.
    """
    if len(values) < max(warmup, 1):
        return None
    values = torch.tensor(values, dtype=torch.float64)
    mean, spread = values.mean(), values.std(correction=0)
    return float(mean + sensitivity * torch.maximum(spread, spread_floor * mean))


def quantiles(latents: torch.Tensor) -> torch.Tensor:
    """The values of each channel in ascending order, (..., C, T, H, W) -> (..., C, T * H * W)."""
    values = latents.flatten(-3)
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return values.sort(dim=-1).values
    # NumPy sorts with vector instructions: about thirty times as fast as torch on a CPU with AVX-512.
    return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1))


def resampled(values: torch.Tensor, count: int) -> torch.Tensor:
    """Quantiles, (..., any), interpolated to `count` values in each channel."""
    if values.shape[-1] == count:
        return values
    flat = values.flatten(0, -2)[None]
    return F.interpolate(flat, count, mode="linear", align_corners=True).view(*values.shape[:-1], -1)


def magnitude(offsets: torch.Tensor) -> float:
    """Root mean square."""
    return offsets.square().mean().sqrt().item()


def jump(quantiles: torch.Tensor, reference: torch.Tensor) -> float:
    """Wasserstein-2 distance of two chunks' values, given as `quantiles`, (C, any), root mean square over channels.
    Independent of the positions of values."""
    return magnitude(quantiles - resampled(reference, quantiles.shape[-1]))


def mean_offsets(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How far the mean of each channel is from the reference's, in standard deviations of the reference's values,
    (C, T, H, W) -> (C,)."""
    values, reference_values = latents.flatten(1), reference.flatten(1)
    return (values.mean(1) - reference_values.mean(1)) / reference_values.std(1).clamp_min(1e-6)
