# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The drift report of one video, for the page; `tokentrim drift` measures."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from tokentrim.tools.drift import measure_video, write_json
from tokentrim.tools.drift_plot import plot_drift
from tokentrim.tools.frames import Limits, read_frames


LIMITS = Limits(frames=20_000, seconds=60)  # for one visitor, because others wait

ROWS = (  # name of the measure, title, digits, value without drift
    ("color_similarity", "Colors in common, end with start", "{:.1f}%", "100%"),
    ("color_distance", "Distance of the colors, end from start", "{:.1f}%", "0"),
    ("worst_similarity", "Colors in common, worst twentieth with start", "{:.1f}%", "100%"),
    ("brightness_slope", "Change of brightness", "{:+.3f}", "0"),
    ("contrast_slope", "Change of contrast", "{:+.3f}", "0"),
    ("saturation_slope", "Change of saturation", "{:+.3f}", "0"),
    ("sharpness_slope", "Change of sharpness", "{:+.3f}", "0"),
    ("motion_late_to_early", "Motion, end over start", "{:.2f}", "1"),
)


def measure(path: Path, numbers: Path) -> tuple[str, Any]:
    """
    Measure a video. Returns the report in Markdown and the figure; writes all numbers to a JSON file.

    Raises:
        `ValueError`: the file is not a video, has fewer than 21 frames, or exceeds [`LIMITS`]; or the folder of
            `numbers` was removed meanwhile. The message is a sentence for the page.
    """
    try:
        with closing(read_frames(path, LIMITS)) as frames:
            drift = measure_video(path.name, while_folder_exists(frames, numbers.parent))
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    measures = drift.measures()
    lines = [f"**{drift.name}**, {drift.num_frames} frames", "", "| measure | value | no drift |", "|---|---|---|"]
    for name, title, form, neutral in ROWS:
        value = "-" if measures[name] is None else form.format(measures[name])
        lines.append(f"| {title} | {value} | {neutral} |")
    lines += ["", "An intended change such as a sunset counts as drift, and a frozen picture does not: docs/drift.md."]
    write_json(numbers, [drift])
    return "\n".join(lines), plot_drift([drift])


def while_folder_exists(frames: Iterator[np.ndarray], folder: Path) -> Iterator[np.ndarray]:
    """The same frames; stop when the visitor leaves, which removes the folder."""
    for frame in frames:
        if not folder.exists():
            raise ValueError("The visitor has left.")
        yield frame
