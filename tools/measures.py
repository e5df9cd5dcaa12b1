# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Drift of a video, measured from its frames alone, without a model. docs/drift.md explains each measure.

A frame becomes a *look* (five numbers) and a color histogram; a video becomes 20 segments of equal length, with the mean
look (segments, 5) and the mean histogram (segments, 512) of each. All measures are functions of these.
"""

from itertools import combinations

import cv2
import numpy as np


LOOKS = ("brightness", "contrast", "saturation", "sharpness", "motion")
NUM_SEGMENTS = 20
NUM_ENDS = 3  # segments that are start and end: 15% each, as in FramePack
NUM_CHUNKS = 10  # as in LV-Bench
SIDE, FLOW_SIDE = (
    240,
    120,
)  # smallest shorter side of reduced frames, in pixels; also for the optical flow
STILL = 1e-4  # share of the diagonal per frame: optical flow finds less than this between equal frames
CUT_SIDE, ALIKE = (
    16,
    0.5,
)  # side of the pictures that are compared across a cut, and the correlation below which it is one
LEVELS, FINE = 8, 64  # levels of each color channel in the histogram, and in the finer one behind it
# (LEVELS, FINE): the share of each level in each fine one, from linear interpolation.
SHARES = np.maximum(1 - np.abs(np.arange(LEVELS)[:, None] - np.linspace(0, LEVELS - 1, FINE)), 0)


# Frames


def reduce(frame: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Average squares of n x n pixels, with the largest n that leaves the shorter side `side` pixels or more."""
    height, width = frame.shape[:2]
    factor = max(min(height, width) // side, 1)
    return cv2.resize(frame, (width // factor, height // factor), interpolation=cv2.INTER_AREA)


def measure_look(frame: np.ndarray, before: np.ndarray) -> np.ndarray:
    """`LOOKS` of a uint8 frame (H, W, 3): levels are shares of white, motion is in shares of the frame's diagonal."""
    grey, grey_before = (cv2.cvtColor(each, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255 for each in (frame, before))
    brightness, contrast = grey.mean(), grey.std()
    red, green, blue = cv2.split(frame)
    highest, lowest = (float(choose(choose(red, green), blue).sum()) for choose in (cv2.max, cv2.min))
    saturation = 1 - lowest / max(highest, 1)
    if contrast < 1 / 255:  # less than a step of 8 bits: edges and motion are invisible
        return np.array([brightness, contrast, saturation, 0, 0])
    grey, grey_before = (grey - brightness) / contrast, (grey_before - brightness) / contrast
    return np.array(
        [brightness, contrast, saturation, cv2.Laplacian(grey, cv2.CV_32F).std(), measure_motion(grey, grey_before)]
    )


def measure_motion(grey: np.ndarray, before: np.ndarray) -> float:
    """Mean length of the Farneback flow from one gray picture (H, W) to the next, in shares of the diagonal.

    Pictures have mean 0 and deviation 1, because this flow finds less and less motion in fading ones."""
    pair = [reduce(np.clip(48 * each + 128, 0, 255).astype(np.uint8), FLOW_SIDE) for each in (before, grey)]
    flow = cv2.calcOpticalFlowFarneback(*pair, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    length = np.linalg.norm(flow, axis=2).mean() / np.hypot(*flow.shape[:2])
    return float(length) if length > STILL else 0.0


def is_cut(frame: np.ndarray, before: np.ndarray) -> bool:
    """Whether a frame shows another picture than the one before: their gray pictures, 16 pixels high, correlate by less
    than a half. Leaps of the content count too; changes of brightness and color do not."""
    pair = []
    for each in (frame, before):
        grey = cv2.cvtColor(reduce(each, CUT_SIDE), cv2.COLOR_RGB2GRAY).astype(np.float32)
        pair.append(grey - grey.mean())
    norms = [np.linalg.norm(each) for each in pair]
    if min(norms) < np.sqrt(pair[0].size):  # less than a step of 8 bits: there is nothing to see
        return False
    return bool((pair[0] * pair[1]).sum() < ALIKE * norms[0] * norms[1])


def color_histogram(frame: np.ndarray) -> np.ndarray:
    """Shares of the colors of a uint8 frame (H, W, 3): (512,), from black to white, summing to 1.

    Bins are centered on 8 levels of each channel. A color is shared among the 8 nearest bins (trilinear weights), so the
    histogram changes gradually with the color.
    """
    fine = cv2.calcHist([frame], [0, 1, 2], None, [FINE] * 3, [0, 256] * 3)
    return np.einsum("rgb,ir,jg,kb->ijk", fine, *[SHARES] * 3, optimize=True).ravel() / fine.sum()


# Time


class Timeline:
    """Means of rows over equal stretches of time, for an unknown number of rows.

    It holds at most `limit` (even) stretches. When they are full, neighbors are merged and stretches double in length.
    """

    def __init__(self, limit: int = 1024):
        self.limit, self.length, self.count = limit, 1, 0
        self.sums: list[np.ndarray] = []

    def add(self, row: np.ndarray) -> None:
        if self.count == self.limit * self.length:
            self.sums = [first + second for first, second in zip(self.sums[::2], self.sums[1::2])]
            self.length *= 2
        if self.count % self.length == 0:
            self.sums.append(np.zeros(row.shape))
        self.sums[-1] += row
        self.count += 1

    def split(self, num_segments: int) -> tuple[np.ndarray, np.ndarray]:
        """Means of `num_segments` nearly equal parts, (segments, ...), and the rows at which they end, (segments,)."""
        ends = np.minimum(np.arange(1, len(self.sums) + 1) * self.length, self.count)
        cuts = np.linspace(0, len(self.sums), num_segments + 1).round().astype(int)
        means = [
            np.sum(self.sums[first:last], axis=0) / (ends[last - 1] - (ends[first - 1] if first else 0))
            for first, last in zip(cuts, cuts[1:])
        ]
        return np.stack(means), ends[cuts[1:] - 1]


# Measures


def start_and_end(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the first and of the last 15%."""
    return segments[:NUM_ENDS].mean(axis=0), segments[-NUM_ENDS:].mean(axis=0)


def color_similarity(histogram: np.ndarray, other: np.ndarray) -> np.ndarray:
    """100 (1 - |h - g|_1 / 2), the histogram intersection in percent: 100 for equal colors, 0 for no color in common."""
    return 100 * (1 - np.abs(histogram - other).sum(axis=-1) / 2)


def color_distance(histogram: np.ndarray, other: np.ndarray) -> float:
    """Wasserstein distance of the color distributions, mean of the three channels, in percent of the distance from black
    to white. It still grows when no color is in common."""
    difference = (histogram - other).reshape(LEVELS, LEVELS, LEVELS)
    channels = np.stack([difference.sum(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))])  # (3, levels)
    return float(100 * np.abs(channels.cumsum(axis=1)).sum(axis=1).mean() / (LEVELS - 1))


def fit_slope(values: np.ndarray) -> float:
    """Change over the whole video along the least-squares line through the segments' values (segments,)."""
    return float(np.polyfit((np.arange(len(values)) + 0.5) / len(values), values, 1)[0])


def video_drift_error(values: np.ndarray) -> float | None:
    """VDE = sum over i = 2..N of (N - i + 1) |m_i - m_1| / m_1 for N = 10 chunks; None if m_1 is 0."""
    chunks = values.reshape(NUM_CHUNKS, -1).mean(axis=1)
    if chunks[0] == 0:
        return None
    return float(np.arange(NUM_CHUNKS - 1, 0, -1) @ np.abs(chunks[1:] - chunks[0]) / chunks[0])


def color_spread(histograms: np.ndarray) -> float:
    """Mean color distance of pairs of videos, from histograms (videos, 512): how different the videos look."""
    return float(np.mean([color_distance(*pair) for pair in combinations(histograms, 2)]))
