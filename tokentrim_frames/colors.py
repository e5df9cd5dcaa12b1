# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How far the colors of a video have moved, as the eye sees it: distances of whole color distributions, not of means."""

from collections.abc import Sequence

import numpy as np


NUM_START = 3  # chunks that are the start: one alone may be a bad example
ROWS = 4  # bands of the picture, top to bottom: colors that change places between them count as well
LEVELS = 64  # quantiles that a distribution is compared by


def color_levels(frames: np.ndarray) -> np.ndarray:
    """
    The distribution of each color channel in each band of the picture.

    Args:
        frames (`np.ndarray`): uint8 (frames, H, W, 3).

    Returns:
        `np.ndarray`: (bands, levels, 3), quantiles from 0 to 100.
    """
    bands = np.array_split(frames, ROWS, axis=1)
    middles = (np.arange(LEVELS) + 0.5) / LEVELS
    return np.stack([np.quantile(band.reshape(-1, 3), middles, axis=0) for band in bands]) / 2.55


def color_drift(frames: np.ndarray, chunk_frames: Sequence[int]) -> np.ndarray:
    """
    How far the colors of each chunk have moved from those of the first three chunks: the Wasserstein distance of each
    color channel in each of four bands of the picture, averaged. 0: the same colors; 100: black has become white. New
    content counts too, so compare methods on one prompt and noise.

    Args:
        frames (`np.ndarray`): uint8 (frames, H, W, 3).
        chunk_frames (`Sequence[int]`): frames of each chunk.

    Returns:
        `np.ndarray`: (chunks,).
    """
    chunks = np.split(frames, np.cumsum(chunk_frames)[:-1])
    levels = np.stack([color_levels(chunk) for chunk in chunks])  # (chunks, bands, levels, 3)
    start = color_levels(np.concatenate(chunks[:NUM_START]))
    return np.abs(levels - start).mean(axis=(1, 2, 3))


def end_of(drift: np.ndarray) -> float:
    """Drift at the end: mean over the last quarter of the chunks."""
    return float(drift[-max(len(drift) // 4, 1) :].mean())
