# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of an experiment's report: curves over time, and film strips of the middle frames of chunks."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib import colormaps
from matplotlib.figure import Figure

from .experiment import Experiment, part


def curves(table: pd.DataFrame, measures: dict[str, str]) -> Figure:
    """Plot measures by chunk, mean over videos, a line for each method."""
    figure = Figure(figsize=(11, 2.6 * len(measures)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(measures), 1, sharex=True))
    for axis, (measure, title) in zip(axes, measures.items()):
        axis.set_prop_cycle(cycler(linestyle=("-", "--", ":")) * cycler(color=colormaps["tab10"].colors))
        for method, rows in table.groupby("method", sort=False):
            axis.plot(rows.groupby("chunk")[measure].mean(), label=method)
        axis.set(ylabel=title)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    axes[-1].set_xlabel("chunk")
    return figure


def middle_frames(experiment: Experiment, out: Path, methods: list[str], wanted: Collection[int]) -> dict:
    """Frames (chunks, H, W, 3) by method and seed."""
    frames = {}
    for name, seeds in experiment.jobs():
        if name in methods and set(seeds) & set(wanted):
            middles = np.load(part(out, name, seeds).with_suffix(".npz"))["frames"]
            frames |= {(name, seed): video for seed, video in zip(seeds, middles) if seed in wanted}
    return frames


def strips(rows: list[tuple[str, np.ndarray]], columns: int = 12) -> Figure:
    """A film strip for each label and frames, (chunks, H, W, 3)."""
    shown = np.unique(np.linspace(0, len(rows[0][1]) - 1, columns).round().astype(int))
    figure = Figure(figsize=(0.72 * len(shown) + 3.2, 0.81 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.01, w_pad=0.01, hspace=0, wspace=0)
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for line, (label, frames) in zip(axes, rows):
        for axis, chunk in zip(line, shown):
            axis.imshow(frames[chunk])
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axis, chunk in zip(axes[0], shown):
        axis.set_title(f"chunk {chunk}" if chunk == 0 else f"{chunk}", fontsize=8)
    return figure


def overview(experiment: Experiment, out: Path) -> Figure:
    """The first video of each method; the first ten of a single method."""
    methods = list(experiment.methods)
    several, count = len(methods) > 1, min(10, experiment.num_seeds)
    seeds = range(experiment.first_seed, experiment.first_seed + (1 if several else count))
    frames = middle_frames(experiment, out, methods, seeds)
    return strips([(method if several else f"seed {seed}", video) for (method, seed), video in frames.items()])


def cases(videos: pd.DataFrame, experiment: Experiment, out: Path, method: str, reference: str) -> Figure:
    """Film strips of the five videos whose drift falls most and the five where it falls least."""
    wide = videos.pivot(index="seed", columns="method", values=drift_measure(videos))
    effects = (wide[method] - wide[reference]).sort_values()
    chosen = [*effects.index[:5], *effects.index[max(5, len(effects) - 5) :]]
    frames, rows = middle_frames(experiment, out, [method, reference], chosen), []
    for seed in chosen:
        rows += [
            (reference, frames[reference, seed]),
            (f"{method}\nseed {seed}, {effects[seed]:+.3g}", frames[method, seed]),
        ]
    return strips(rows)


def drift_measure(videos: pd.DataFrame) -> str:
    """The best measure of drift in a world: identity if it is known, otherwise color."""
    return "excess_drift" if "excess_drift" in videos else "color_drift"
