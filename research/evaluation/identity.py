# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Identity error: the distance of each frame to a rendering of the video's first chunk at the object's current place.

An object of the tiny world keeps its outline, texture and colors and does not turn. A background is one color with a
linear gradient. A frame of the first chunk, cut into object and background, therefore predicts every later frame except
for the place of the object, and a search finds the place that fits best.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, shift
from scipy.signal import fftconvolve


MARGIN = 2  # an object may extend beyond the picture by this many pixels


@dataclass
class Appearance:
    """A frame in two layers; a rendering is `object + (1 - coverage) * background`, with the first two moved.

    Args:
        object (`np.ndarray`): sRGB times coverage, (H, W, 3).
        coverage (`np.ndarray`): in [0, 1], (H, W).
        background (`np.ndarray`): sRGB, (H, W, 3).
    """

    object: np.ndarray
    coverage: np.ndarray
    background: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray, mask: np.ndarray) -> "Appearance":
        """Cut the middle frame of a chunk, (frames, H, W, 3) in [0, 1], into layers that compose to the same frame.

        Args:
            frames (`np.ndarray`): of one chunk.
            mask (`np.ndarray`): which pixels look like the object, (frames, H, W).
        """
        y, x = np.indices(frames.shape[1:3]) / frames.shape[1]
        plane = np.stack([np.ones_like(x), x, y], axis=-1)  # (H, W, 3)
        away = ~np.stack([binary_dilation(each, iterations=2) for each in mask])
        points = np.broadcast_to(plane, (*mask.shape, 3))[away]
        background = plane @ np.linalg.lstsq(points, frames[away], rcond=None)[0]

        frame, inside = frames[len(frames) // 2], mask[len(frames) // 2]
        step = np.median(frame[inside], axis=0) - background if inside.any() else np.ones_like(background)
        along = ((frame - background) * step).sum(axis=-1) / np.maximum((step**2).sum(axis=-1), 1e-6)
        coverage = np.where(binary_erosion(inside), 1.0, along.clip(0, 1) * binary_dilation(inside))
        return cls(frame - (1 - coverage[..., None]) * background, coverage, background)

    def render(self, offset: tuple[float, float]) -> np.ndarray:
        """The frame with its object moved by (y, x) pixels, (H, W, 3)."""
        return (
            shift(self.object, (*offset, 0), order=1)
            + (1 - shift(self.coverage, offset, order=1))[..., None] * self.background
        )

    def place(self, frame: np.ndarray) -> tuple[tuple[float, float], float]:
        """Find the offset (y, x) whose rendering is nearest to `frame`, (H, W, 3), to half a pixel, and its RMSE.

        The object must stay in the picture, as it does in this world: a lost object fits nowhere.
        """
        # The squared error of every whole offset d at once: with r = frame - background, o and c the moved layers,
        # sum (r - o + c b)^2 = sum r^2 + o^2 + c^2 b^2 - 2 r o + 2 r b c - 2 b o c, each a correlation.
        residual = frame - self.background
        spatial = (0, 1)

        def correlate(fixed, moved):
            return fftconvolve(fixed, moved[::-1, ::-1], axes=spatial).sum(axis=-1)

        coverage = np.broadcast_to(self.coverage[..., None], self.object.shape)
        error = (
            correlate(np.ones_like(frame), self.object**2)
            + correlate(self.background**2, coverage**2)
            - 2 * correlate(residual, self.object)
            + 2 * correlate(residual * self.background, coverage)
            - 2 * correlate(self.background, self.object * coverage)
        )
        inside = np.argwhere(self.coverage > 0.5) if (self.coverage > 0.5).any() else np.zeros((1, 2), int)
        lowest, highest = -inside.min(axis=0) - MARGIN, np.array(frame.shape[:2]) - 1 - inside.max(axis=0) + MARGIN
        zero = np.array(frame.shape[:2]) - 1  # index of offset 0 in the correlation
        allowed = error[tuple(slice(low, high + 1) for low, high in zip(lowest + zero, highest + zero))]
        y, x = (int(each) for each in np.unravel_index(allowed.argmin(), allowed.shape) + lowest)
        offsets = [(y + half_y, x + half_x) for half_y in (-0.5, 0, 0.5) for half_x in (-0.5, 0, 0.5)]
        errors = [np.sqrt(((frame - self.render(offset)) ** 2).mean()) for offset in offsets]
        nearest = int(np.argmin(errors))
        return offsets[nearest], float(errors[nearest])
