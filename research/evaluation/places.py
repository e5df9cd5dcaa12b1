# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measures that know the world of photographs: where in its photograph a frame was taken, and how far it is from there.

The best place is searched by structure alone: descriptors are centered and scaled in each channel, so that a frame
whose colors have drifted is still found. What is left at that place is compared in color and in features.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import KDTree
from skimage.color import rgb2lab

from research.training.photographs import (
    PHOTOGRAPH_HEIGHT,
    SIZE,
    ZOOMS,
    load_places,
    parse,
    view,
)

from .fidelity import features


GRID = 12  # places of a descriptor along height and width
TILE = 4  # of these in a tile
COLUMN_STEP, NUM_ROWS, NUM_ZOOMS = 5.0, 5, 3  # of the search
REFINEMENTS = 4  # each halves the steps
MAX_CAST = 20.0  # CIE76: a frame whose colors are further off than this may be of another photograph


def describe(frames: np.ndarray) -> np.ndarray:
    """CIELAB of frames (N, H, W, 3) in [0, 1], averaged over a grid: (N, GRID, GRID, 3)."""
    means = F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float(), GRID)
    return rgb2lab(means.permute(0, 2, 3, 1).numpy())


def normalize(descriptors: np.ndarray) -> np.ndarray:
    """Descriptors, (N, GRID, GRID, 3), without mean and spread of each channel, as unit vectors (N, D)."""
    centered = descriptors - descriptors.mean(axis=(1, 2), keepdims=True)
    # A channel without structure, such as the color of a gray sky, counts little.
    scaled = centered / (centered.std(axis=(1, 2), keepdims=True) + 2)
    flat = scaled.reshape(len(scaled), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)


def look(photograph: torch.Tensor, cameras: np.ndarray) -> np.ndarray:
    """Frames, (N, H, W, 3) in [0, 1], of cameras (N, 3): zoom, x, and y as a share of the margin."""
    zoom, x, share = torch.from_numpy(cameras).double().T
    margin = (PHOTOGRAPH_HEIGHT - SIZE / zoom) / 2
    return view(photograph, zoom, x, share * margin).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Atlas:
    """A photograph from many places: cameras (N, 3), and the descriptors of what they see."""

    photograph: torch.Tensor
    cameras: np.ndarray
    descriptors: np.ndarray

    @classmethod
    def of(cls, photograph: torch.Tensor) -> "Atlas":
        width = PHOTOGRAPH_HEIGHT * photograph.shape[2] / photograph.shape[1]
        axes = (
            np.linspace(*ZOOMS, NUM_ZOOMS),
            np.arange(0, 2 * width, COLUMN_STEP),
            np.linspace(-1, 1, NUM_ROWS),
        )
        cameras = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        batches = np.array_split(cameras, max(len(cameras) // 100, 1))
        return cls(photograph, cameras, np.concatenate([describe(look(photograph, batch)) for batch in batches]))

    def locate(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """The camera, (3,), whose view is most like a frame, (H, W, 3) in [0, 1]; that view, and their correlation."""
        target = normalize(describe(frame[None]))[0]
        scores = normalize(self.descriptors) @ target
        camera = self.cameras[scores.argmax()]
        steps = np.array([(ZOOMS[1] - ZOOMS[0]) / (NUM_ZOOMS - 1), COLUMN_STEP, 2 / (NUM_ROWS - 1)])
        around = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        for _ in range(REFINEMENTS):
            steps = steps / 2
            cameras = camera + around * steps
            cameras[:, 0] = cameras[:, 0].clip(*ZOOMS)
            cameras[:, 2] = cameras[:, 2].clip(-1, 1)
            views = look(self.photograph, cameras)
            scores = normalize(describe(views)) @ target
            camera, best = cameras[scores.argmax()], views[scores.argmax()]
        return camera, best, float(scores.max())


def tiles(descriptors: np.ndarray) -> np.ndarray:
    """Tiles of descriptors, (N, GRID, GRID, 3) -> (N, tiles, D)."""
    count = GRID // TILE
    parts = descriptors.reshape(len(descriptors), count, TILE, count, TILE, 3).swapaxes(2, 3)
    return parts.reshape(len(descriptors), count**2, -1)


@cache
def load_atlases() -> dict[str, Atlas]:
    return {place: Atlas.of(photograph) for place, photograph in load_places().items()}


@cache
def load_tiles() -> dict[str, KDTree]:
    """The tiles of every place, to be searched."""
    return {
        place: KDTree(tiles(atlas.descriptors).reshape(-1, 3 * TILE**2)) for place, atlas in load_atlases().items()
    }


def other_share(descriptors: np.ndarray, place: str) -> np.ndarray:
    """Share of each frame's tiles, (N,), that look more like another photograph than like their own."""
    parts = tiles(descriptors)
    flat = parts.reshape(-1, parts.shape[-1])
    distances = {name: tree.query(flat)[0] for name, tree in load_tiles().items()}
    own = distances.pop(place)
    return (np.min(list(distances.values()), axis=0) < own).reshape(len(parts), -1).mean(axis=1)


def measure_places(frames: np.ndarray, prompt: str) -> list[dict[str, float]]:
    """How far frames, (N, H, W, 3) in [0, 1], are from the best place in the photograph that the prompt names.

    - `structure_error`: 1 minus the correlation of the descriptors at that place.
    - `color_error`: mean CIE76 of the descriptors at that place.
    - `feature_error`: distance of the features of an EfficientNet, over the norm of the place's features.
    - `other_share`: share of the tiles that look more like another photograph, after the frame's color cast is removed.
    - `zoom`, `x`: the camera that was found.
    """
    place = parse(prompt).place
    atlas, rows, views = load_atlases()[place], [], []
    for frame in frames:
        camera, best, correlation = atlas.locate(frame)
        rows.append({"structure_error": 1 - correlation, "zoom": camera[0], "x": camera[1]})
        views.append(best)
    ours, theirs = describe(frames), describe(np.stack(views))
    as_bytes = [(each * 255).round().astype(np.uint8) for each in (frames, np.stack(views))]
    looks, true_looks = (features(each) for each in as_bytes)
    color = np.linalg.norm(ours - theirs, axis=-1).mean(axis=(1, 2))
    feature = np.linalg.norm(looks - true_looks, axis=1) / np.linalg.norm(true_looks, axis=1)
    cast = np.median(ours - theirs, axis=(1, 2), keepdims=True)  # (N, 1, 1, 3)
    cast *= np.minimum(1, MAX_CAST / np.linalg.norm(cast, axis=-1, keepdims=True).clip(1e-6))
    for row, *values in zip(rows, color, feature, other_share(ours - cast, place)):
        row |= dict(zip(("color_error", "feature_error", "other_share"), map(float, values)))
    return rows
