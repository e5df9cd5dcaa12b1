# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How a tiny-world video looks over time, measured from its frames and its prompt."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from skimage.color import deltaE_ciede2000, lab2rgb, rgb2lab
from skimage.measure import label, regionprops

from research.training.world import COLORS, parse
from tokentrim.tokentrim_frames.output import as_uint8
from tokentrim.tools.measures import LOOKS, measure_look, reduce

from .identity import Appearance


@dataclass
class Colors:
    """Object and background of each chunk, as CIELAB medians, and the place of the object.

    Args:
        object (`np.ndarray`): (chunks, 3) CIELAB; NaN if no pixel looks like the object.
        background (`np.ndarray`): (chunks, 3) CIELAB.
        area (`np.ndarray`): (frames,) share of the pixels that look like the object.
        center (`np.ndarray`): (frames, 2) mean place (y, x) of those pixels; NaN if none exist.
        mask (`np.ndarray`): (frames, H, W), marks those pixels.
    """

    object: np.ndarray
    background: np.ndarray
    area: np.ndarray
    center: np.ndarray
    mask: np.ndarray


def difference(lab: np.ndarray, color: np.ndarray) -> np.ndarray:
    """CIEDE2000 distance of CIELAB colors (..., 3) to one color (3,)."""
    return deltaE_ciede2000(lab, np.broadcast_to(color, lab.shape))


def track_colors(frames: np.ndarray, prompt: str, num_frames_per_chunk: int) -> Colors:
    """Follow object and background through a video, (frames, H, W, 3) in [0, 1].

    A pixel belongs to the nearer color (CIEDE2000), the object's or the background's. Both colors start as the prompt
    names them. After each chunk they become the medians of their pixels, so they follow slow change.
    """
    scene = parse(prompt)
    names = np.array([COLORS[scene.color], COLORS[scene.background]])
    object_color, background_color = rgb2lab(names[None])[0]
    objects, backgrounds, areas, centers, masks = [], [], [], [], []
    for start in range(0, len(frames), num_frames_per_chunk):
        lab = rgb2lab(frames[start : start + num_frames_per_chunk])  # (frames, H, W, 3)
        mask = difference(lab, object_color) < difference(lab, background_color)
        if mask.any():
            object_color = np.median(lab[mask], axis=0)
        if not mask.all():
            background_color = np.median(lab[~mask], axis=0)
        objects.append(object_color if mask.any() else np.full(3, np.nan))
        backgrounds.append(background_color)
        areas.extend(mask.mean(axis=(1, 2)))
        centers.extend(np.argwhere(each).mean(axis=0) if each.any() else np.full(2, np.nan) for each in mask)
        masks.extend(mask)
    return Colors(*(np.array(each) for each in (objects, backgrounds, areas, centers, masks)))


def name_shape(mask: np.ndarray) -> str | None:
    """The shape of the world that a mask, (H, W), looks like, by its hole or its share of the bounding box; None if the
    mask is empty."""
    parts = regionprops(label(mask))
    if not parts:
        return None
    largest = max(parts, key=lambda part: part.area)
    if largest.area_filled > 1.05 * largest.area:
        return "ring"
    # A square fills its box, a circle pi / 4 of it, a triangle half; the model rounds corners.
    return "square" if largest.extent > 0.84 else "circle" if largest.extent > 0.66 else "triangle"


def scattered(mask: np.ndarray) -> float:
    """Share of a mask's pixels, (H, W), outside its largest connected part: large if the object is in pieces."""
    sizes = [part.area for part in regionprops(label(mask))]
    return float(1 - max(sizes) / sum(sizes)) if sizes else float("nan")


def color_drift(colors: np.ndarray) -> np.ndarray:
    """CIEDE2000 distance of each chunk's color to the first chunk's, (chunks, 3) -> (chunks,)."""
    return difference(colors, colors[0])


def as_rgb(colors: np.ndarray) -> np.ndarray:
    """CIELAB (chunks, 3) as sRGB in [0, 1]; gray for NaN."""
    return np.where(np.isnan(colors), 0.5, lab2rgb(np.nan_to_num(colors)[None])[0])


def present_mean(values: np.ndarray) -> float:
    """Mean without the NaNs; NaN if all values are NaN."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def motion(colors: Colors) -> float:
    """Mean distance in pixels that the object moves from frame to frame: freezing must not pass for stability."""
    return present_mean(np.linalg.norm(np.diff(colors.center, axis=0), axis=1))


def summarize_drift(frames: np.ndarray, prompt: str, num_frames_per_chunk: int) -> dict[str, float]:
    """Drift of a video: distance of each color to the first chunk, mean over the last half, and motion."""
    colors = track_colors(frames, prompt, num_frames_per_chunk)
    half = len(colors.background) // 2
    return {
        "background_drift": float(color_drift(colors.background)[half:].mean()),
        "object_drift": present_mean(color_drift(colors.object)[half:]),
        "object_lost": float(np.mean(colors.area[half * num_frames_per_chunk :] < 0.01)),
        "motion": motion(colors),
    }


def mean_look(frames: np.ndarray) -> dict[str, float]:
    """The looks of `tokentrim drift`, mean over the second to the last of uint8 frames (frames, H, W, 3)."""
    looks = [measure_look(frame, before) for before, frame in pairwise(map(reduce, frames))]
    return dict(zip(LOOKS, np.mean(looks, axis=0).tolist()))


def frame_look(frames: np.ndarray) -> dict[str, float]:
    """M of a chunk, (frames, H, W, 3) in [0, 1]: measures that need neither prompt nor pretrained model."""
    lab, look = rgb2lab(frames), mean_look(as_uint8(frames))
    means, spreads = lab.mean(axis=(0, 1, 2)), lab.std(axis=(0, 1, 2))
    return {
        **{f"{channel}_mean": float(value) for channel, value in zip("Lab", means)},
        **{f"{channel}_spread": float(value) for channel, value in zip("Lab", spreads)},
        **{name: look[name] for name in ("saturation", "contrast", "sharpness")},
        "flicker": float(np.abs(np.diff(frames, axis=0)).mean()),
        "flow": look["motion"],
    }


def measure_chunks(frames: np.ndarray, prompt: str, num_frames_per_chunk: int) -> list[dict[str, float]]:
    """All measures of each chunk of a video, (frames, H, W, 3) in [0, 1]."""
    colors, scene = track_colors(frames, prompt, num_frames_per_chunk), parse(prompt)
    appearance = Appearance.of(frames[:num_frames_per_chunk], colors.mask[:num_frames_per_chunk])
    steps = np.linalg.norm(np.diff(colors.center, axis=0), axis=1)
    rows = []
    for chunk, start in enumerate(range(0, len(frames), num_frames_per_chunk)):
        stop = start + num_frames_per_chunk
        middle = (start + stop) // 2
        apart = deltaE_ciede2000(colors.object[chunk], colors.background[chunk])
        rows.append(
            {
                "identity_error": appearance.place(frames[middle])[1],
                "background_error": float(deltaE_ciede2000(colors.background[chunk], colors.background[0])),
                "object_error": float(deltaE_ciede2000(colors.object[chunk], colors.object[0])),
                "area": float(colors.area[start:stop].mean()),
                "present": bool(colors.area[middle] >= 0.01 and apart >= 10),
                "shape_right": name_shape(colors.mask[middle]) == scene.shape,
                "scattered": scattered(colors.mask[middle]),
                "motion": present_mean(steps[max(start - 1, 0) : stop - 1]),
                **frame_look(frames[start:stop]),
            }
        )
    return rows
