# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How far the colors of a video have moved, as the eye sees it: distances of whole color distributions, not of means."""

from collections.abc import Sequence

import numpy as np

from ..tokentrim_checks import check_number


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


def color_drift(frames: np.ndarray, chunk_frames: Sequence[int], top: float = 1.0) -> np.ndarray:
    """
    How far the colors of each chunk have moved from those of the first three chunks: the Wasserstein distance of each
    color channel in each of four bands of the picture, averaged. 0: the same colors; 100: black has become white. New
    content counts too, so compare methods on one prompt and noise.

    Args:
        frames (`np.ndarray`): uint8 (frames, H, W, 3).
        chunk_frames (`Sequence[int]`): frames of each chunk.
        top (`float`, defaults to `1.0`):
            Share of the height, from the top, that is looked at: below 1 where the rest is meant to change, as the ground
            under a sky does when the camera travels.

    Returns:
        `np.ndarray`: (chunks,).
    """
    meter = ColorMeter(top)
    return np.array([meter.add(chunk) for chunk in np.split(frames, np.cumsum(chunk_frames)[:-1])])


class ColorMeter:
    """[`color_drift`] of a video while it is made, chunk by chunk. The start is the mean of the chunks so far, up to three."""

    def __init__(self, top: float = 1.0):
        check_number("top", top, lambda share: 0 < share <= 1, "a number above 0, up to 1")
        self.top, self.start = top, []

    def add(self, chunk: np.ndarray) -> float:
        """How far the colors of the next chunk, uint8 (frames, H, W, 3), are from the start."""
        levels = color_levels(chunk[:, : max(round(self.top * chunk.shape[1]), ROWS)])
        if len(self.start) < NUM_START:
            self.start.append(levels)
        return float(np.abs(levels - np.mean(self.start, axis=0)).mean())


def end_of(drift: np.ndarray) -> float:
    """Drift at the end: mean over the last quarter of the chunks."""
    return float(drift[-max(len(drift) // 4, 1) :].mean())
