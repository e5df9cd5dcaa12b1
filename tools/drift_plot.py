# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The figure of `tokentrim drift`: film strips, and every measure over time."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..tokentrim_writing import whole_file
from .drift import Drift, group_by_folder, shorten
from .measures import NUM_ENDS, NUM_SEGMENTS, color_spread
from .targets import PLOT_MARK


MAX_STRIPS, NUM_PICTURES = 8, 12
BLACK = "0.15"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar in a file's name is a dollar
}
TITLES = (
    "color similarity to the start",
    "brightness (share of white)",
    "contrast (standard deviation)",
    "saturation",
    "sharpness (edges / contrast)",
    "motion (% of the diagonal per frame)",
)
SCALES = (1, 1, 1, 1, 100)  # of the looks
MIDDLES = 100 * (np.arange(NUM_SEGMENTS) + 0.5) / NUM_SEGMENTS  # of the segments, in percent


def write_plot(path: Path, drifts: Sequence[Drift]) -> None:
    """The figure as a file; it is marked, so that it is never measured as a frame of the folder that it lies in."""
    mark = {"Software" if path.suffix.lower() == ".png" else "Creator": PLOT_MARK}
    with whole_file(path) as unfinished:
        plot_drift(drifts).savefig(unfinished, dpi=110, metadata=mark)


def plot_drift(drifts: Sequence[Drift]) -> Figure:
    """Film strips of up to 8 videos, and six panels over time: a line for each of up to 8 videos of one folder; else the
    median of each folder over thin lines for its videos."""
    groups = group_by_folder(drifts)
    one_by_one = len(groups) == 1 and len(drifts) <= MAX_STRIPS
    if one_by_one:
        groups = {drift.name: [drift] for drift in drifts}
    colors = {drift.name: f"C{number}" for number, group in enumerate(groups.values()) for drift in group}
    names = dict(zip(colors, shorten(list(colors), 80)))
    strips = [drift for each in groups.values() for drift in each[: max(MAX_STRIPS // len(groups), 1)]]
    with matplotlib.rc_context(STYLE):
        heights = 0.85 * len(strips) + 0.3, 4.9
        figure = Figure(figsize=(11, sum(heights)), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=heights)
        rows = above.subplots(len(strips), 2, squeeze=False, width_ratios=(2, 9))
        for (label, row), drift in zip(rows, strips):
            draw_strip(label, row, drift, names[drift.name], colors[drift.name])
        panels = below.subplots(2, 3, sharex=True).ravel()
        for panel in panels:
            shade_ends(panel)
        for number, group in enumerate(groups.values()):
            color = f"C{number}"
            draw_lines(panels[0], [drift.similarities() for drift in group], color)
            for look, panel in enumerate(panels[1:]):
                draw_lines(panel, [SCALES[look] * drift.looks[:, look] for drift in group], color)
        for number, group in enumerate(group_by_folder(drifts).values()):
            if len(group) > 1:
                histograms = np.stack([drift.histograms for drift in group], axis=1)  # (segments, videos, 512)
                spread = [color_spread(each) for each in histograms]
                panels[0].plot(MIDDLES, spread, ":", color=BLACK if one_by_one else f"C{number}")
        for panel, title in zip(panels, TITLES):
            panel.set(title=title, xlim=(0, 100))
        panels[0].set_ylim(0, 103)
        for panel in panels[1:]:
            widen(panel)
        for panel in panels[3:]:
            panel.set_xlabel("part of the video, %")
        folders = [] if one_by_one else enumerate(groups)
        handles = [Line2D([], [], color=f"C{number}", label=folder) for number, folder in folders]
        if len(drifts) > 1:
            handles.append(Line2D([], [], color=BLACK, linestyle=":", label="color distance between videos"))
            figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    return figure


def draw_strip(label: Axes, row: Axes, drift: Drift, name: str, color: str) -> None:
    """The video's name, and evenly spaced frames beside it."""
    label.text(1, 0.5, "\n".join(wrap(name, 26)[:3]), ha="right", va="center", color=color)
    chosen = np.linspace(0, len(drift.thumbnails) - 1, NUM_PICTURES).round().astype(int)
    pictures = [drift.thumbnails[number] for number in chosen]
    gap = np.full((len(pictures[0]), 3, 3), 255, np.uint8)
    row.imshow(np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1))
    row.set_anchor("W")
    for axes in (label, row):
        axes.set_axis_off()


def shade_ends(axes: Axes) -> None:
    share = 100 * NUM_ENDS / NUM_SEGMENTS
    for first in (0, 100 - share):
        axes.axvspan(first, first + share, color="0.965", linewidth=0)


def draw_lines(axes: Axes, lines: Sequence[np.ndarray], color: str) -> None:
    """The median of the videos' values (segments,), over thin lines for each of them."""
    if len(lines) > 1:
        axes.plot(MIDDLES, np.transpose(lines), color=color, linewidth=0.7, alpha=0.4)
    axes.plot(MIDDLES, np.median(lines, axis=0), color=color, linewidth=1.6 if len(lines) == 1 else 2.4)


def widen(axes: Axes) -> None:
    """Leave room, so that small changes look small: the axis spans at least a quarter of its largest value."""
    low, high = axes.get_ylim()
    missing = max(0.25 * high - (high - low), 0) / 2
    axes.set_ylim(max(low - missing, 0), high + missing)
