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


LIMITS = Limits(frames=20_000, seconds=60)  # of one visitor: others wait meanwhile

ROWS = (  # name of the measure, what it is, digits, what it is without drift
    ("color_similarity", "Colours in common, end with start", "{:.1f}%", "100%"),
    ("color_distance", "Distance of the colours, end from start", "{:.1f}%", "0"),
    ("worst_similarity", "Colours in common, worst twentieth with start", "{:.1f}%", "100%"),
    ("brightness_slope", "Change of brightness", "{:+.3f}", "0"),
    ("contrast_slope", "Change of contrast", "{:+.3f}", "0"),
    ("saturation_slope", "Change of saturation", "{:+.3f}", "0"),
    ("sharpness_slope", "Change of sharpness", "{:+.3f}", "0"),
    ("motion_late_to_early", "Motion, end over start", "{:.2f}", "1"),
)


def measure(path: Path, numbers: Path) -> tuple[str, Any]:
    """
    Report in Markdown, and figure; all numbers are written to a file of JSON.

    Raises:
        `ValueError`: it is no video, has fewer than 21 frames, or goes beyond [`LIMITS`]; or the folder of `numbers` is
            removed meanwhile. In a sentence.
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
    lines += ["", "A sunset that the prompt asks for counts as drift, and a frozen picture does not: docs/drift.md."]
    write_json(numbers, [drift])
    return "\n".join(lines), plot_drift([drift])


def while_folder_exists(frames: Iterator[np.ndarray], folder: Path) -> Iterator[np.ndarray]:
    """The same frames; reading ends when the visitor leaves, whose folder is removed then."""
    for frame in frames:
        if not folder.exists():
            raise ValueError("The visitor has left.")
        yield frame
