# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The drift report of one or two videos, for the page. `tokentrim drift` measures."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from tokentrim.tools.decoding import read_rate
from tokentrim.tools.drift import measure_video, show, write_json
from tokentrim.tools.drift_plot import plot_drift
from tokentrim.tools.frames import Limits, read_frames
from tokentrim.tools.verdict import ROWS, format_verdicts


LIMITS = Limits(frames=20_000, seconds=60)  # for one visitor, because others wait

PALE, DIM = "#e5e7eb", "#374151"  # text and lines on a dark page


def measure(paths: Path | Sequence[Path], numbers: Path) -> tuple[str, str]:
    """
    Measure a video, or several. Returns the report in Markdown and the figures in HTML; writes all numbers to a JSON file.

    Raises:
        `ValueError`: a file is not a video, has fewer than 21 frames, or exceeds [`LIMITS`]; or the folder of `numbers`
            was removed meanwhile. The message is a sentence for the page.
    """
    drifts = []
    for path in [paths] if isinstance(paths, Path) else paths:
        try:
            with closing(read_frames(path, LIMITS)) as frames:
                drifts.append(measure_video(path.name, while_folder_exists(frames, numbers.parent), read_rate(path)))
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), path.name)) from error
    measures = [drift.measures() for drift in drifts]
    names = " | ".join(drift.name for drift in drifts) if len(drifts) > 1 else "value"
    lengths = " | ".join(str(drift.num_frames) for drift in drifts)
    lines = [*(f"**{line}**\n" for line in format_verdicts(drifts).splitlines()), f"| measure | {names} | no drift |"]
    lines += ["|---" * (len(drifts) + 2) + "|", f"| frames | {lengths} | |"]
    for name, title, form, neutral in ROWS:
        values = " | ".join(show(each[name], form) for each in measures)
        lines.append(f"| {title} | {values} | {neutral} |")
    lines += ["", "Colors: a distance of 100 is black to white; a similarity of 100 is the same colors."]
    lines += ["", "An intended change such as a sunset counts as drift, and a frozen picture does not: docs/drift.md."]
    write_json(numbers, drifts)
    figures = {"for-light": plot_drift(drifts), "for-dark": darkened(plot_drift(drifts))}
    return "\n".join(lines), "".join(as_image(figure, css) for css, figure in figures.items())


def darkened(figure: Figure) -> Figure:
    """The figure for a dark page: pale text and lines, and a dim grid."""
    for dark in (*figure.findobj(Text), *figure.findobj(Line2D)):
        if max(to_rgb(dark.get_color())) < 0.3:
            dark.set_color(PALE)
    for axes in figure.axes:
        axes.tick_params(colors=PALE)
        axes.grid(color=DIM)
        for spine in axes.spines.values():
            spine.set_color(PALE)
        for patch in axes.patches:
            patch.set_facecolor("#1f2937")
    return figure


def as_image(figure: Any, css: str) -> str:
    """A picture with the page's own background."""
    for axes in figure.axes:
        axes.set_facecolor("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{css}" alt="film strips, and each measure over time" src="data:image/png;base64,{data}">'


def while_folder_exists(frames: Iterator[np.ndarray], folder: Path) -> Iterator[np.ndarray]:
    """The same frames; stop when the visitor leaves, which removes the folder."""
    for frame in frames:
        if not folder.exists():
            raise ValueError("The visitor has left.")
        yield frame
