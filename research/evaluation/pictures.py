# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of rollouts: film strip, drift plot, videos side by side."""

from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from tokentrim.tokentrim_frames.mp4 import save_video
from tokentrim.tokentrim_frames.output import (
    QUARANTINE,
    TRIM,
    as_uint8,
    choose_chunks,
    decision_event,
    plot_severity,
)


matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
save_video = partial(save_video, fps=12)


def enlarge(frames: np.ndarray, factor: int = 4) -> np.ndarray:
    """(frames, H, W, 3) in [0, 1] -> uint8, each pixel `factor` times as wide and high."""
    return as_uint8(frames).repeat(factor, axis=1).repeat(factor, axis=2)


def side_by_side(videos: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 (frames, H, W, 3) by name -> one video with a titled column for each."""
    columns = []
    for name, frames in videos.items():
        header = Image.new("RGB", (frames.shape[2], 24), "white")
        ImageDraw.Draw(header).text((6, 6), name, fill="black")
        header = np.broadcast_to(np.asarray(header), (len(frames), *np.asarray(header).shape))
        column = np.concatenate([header, frames], axis=1)
        columns.append(np.pad(column, ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=255))
    return np.concatenate(columns, axis=2)


def film_strip(
    videos: dict[str, np.ndarray], decisions: dict[str, list[dict]], grid: tuple[int, int], columns: int = 14
) -> Figure:
    """A row for each video, a column for each shown chunk: evenly spaced ones and the triggered ones.

    Args:
        videos (`dict[str, np.ndarray]`): (frames, H, W, 3) in [0, 1] by name, of equal length.
        decisions (`dict[str, list[dict]]`): their decisions, one for each chunk.
        grid (`tuple[int, int]`): tokens of a latent frame (height, width), to outline the evicted ones.
        columns (`int`): largest number of chunks.
    """
    num_chunks = len(next(iter(decisions.values())))
    per_chunk = len(next(iter(videos.values()))) // num_chunks
    shown = choose_chunks(list(decisions.values()), columns)

    figure = Figure(figsize=(1.05 * len(shown) + 1.2, 1.2 * len(videos) + 0.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)
    axes = figure.subplots(len(videos), len(shown), squeeze=False)
    for row, (name, frames) in zip(axes, videos.items()):
        for axis, chunk in zip(row, shown):
            decision = decisions[name][chunk]
            frame = frames[chunk * per_chunk + per_chunk // 2]
            axis.imshow(frame.clip(0, 1), extent=(0, grid[1], grid[0], 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for token in decision["tokens"]:
                corner = (token % grid[1], token // grid[1])
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=1.2))
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=TRIM, linewidth=0.6))
            event = decision_event(decision)
            color = {"trimmed": TRIM, "quarantined": QUARANTINE}.get(event, "0.8")
            for spine in axis.spines.values():
                spine.set(visible=True, color=color, linewidth=2 if event else 1)
            if axis in axes[0]:
                axis.set_title(f"chunk {chunk}" if chunk == 0 else f"{chunk}")
            if event:
                axis.set_xlabel(event, color=color, labelpad=1)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def drift_plot(
    decisions: dict[str, list[dict]],
    swatches: dict[str, dict[str, np.ndarray]],
    drifts: dict[str, dict[str, np.ndarray]],
) -> Figure:
    """Plot severity, threshold and triggers of each chunk, and the colors of object and background over time.

    Args:
        decisions (`dict[str, list[dict]]`): by method, one for each chunk.
        swatches (`dict[str, dict[str, np.ndarray]]`): by method and part, sRGB (chunks, 3).
        drifts (`dict[str, dict[str, np.ndarray]]`): by method and part, CIEDE2000 to the first chunk (chunks,).
    """
    parts = list(next(iter(swatches.values())))
    height = 2.2 * len(decisions) + 2.4 * len(parts)
    figure = Figure(figsize=(9, height), layout="constrained")
    rows = [2.2] * len(decisions) + [0.32 * len(decisions), 2.0] * len(parts)
    axes = list(figure.subplots(len(rows), 1, sharex=True, height_ratios=rows))
    for name, method_decisions in decisions.items():
        axis = axes.pop(0)
        plot_severity(axis, method_decisions)
        axis.set(title=name)
    for part in parts:
        strip, axis = axes.pop(0), axes.pop(0)
        colors = np.stack([method_colors[part] for method_colors in swatches.values()])  # (methods, chunks, 3)
        strip.imshow(colors.clip(0, 1), aspect="auto", extent=(-0.5, colors.shape[1] - 0.5, len(colors), 0))
        strip.set(yticks=np.arange(len(colors)) + 0.5, yticklabels=list(swatches), title=f"color of the {part}")
        for name, method_drifts in drifts.items():
            axis.plot(method_drifts[part], label=name)
        axis.set_ylabel("CIEDE2000\nto chunk 0")
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # room for the legend
        axis.legend(loc="upper left", ncols=len(drifts), frameon=False)
    axis.set_xlabel("chunk")
    return figure
