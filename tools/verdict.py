# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the numbers of `tokentrim drift` say, in a sentence for each video, and two videos side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .drift import SMALLEST, Drift, align, group_by_folder, judge, shorten, show


MOST_SENTENCES = 4
ROWS = (  # of two videos side by side: measure, title, digits, value without drift
    ("color_distance", "color distance, end to start", ".1f", "0"),
    ("color_similarity", "color similarity, end to start", ".1f", "100"),
    ("worst_similarity", "color similarity, worst twentieth", ".1f", "100"),
    ("brightness_slope", "change of brightness", "+.3f", "0"),
    ("contrast_slope", "change of contrast", "+.3f", "0"),
    ("saturation_slope", "change of saturation", "+.3f", "0"),
    ("sharpness_slope", "change of sharpness", "+.3f", "0"),
    ("motion_late_to_early", "motion, end over start", ".2f", "1"),
    ("cuts", "cuts", ".0f", "0"),
)


def describe(drift: Drift, name: str) -> str:
    """One sentence on one video."""
    verdict = judge(drift)
    ratio = verdict.distance / verdict.content if verdict.content else np.inf
    if not verdict.drifts:
        why = f", and its content moves them by {verdict.content:.1f}" if verdict.distance > SMALLEST else ""
        return f"{name} does not drift: colors end {verdict.distance:.1f} away from the start{why}."
    if ratio > 100:
        content = "and its content hardly moves them"
    else:
        content = f"{ratio:.1f} times what its content moves"
    begins = f"frame {verdict.first_frame}"
    if drift.fps:
        begins = f"{verdict.first_frame / drift.fps:.1f} s"
    return f"{name} drifts: colors end {verdict.distance:.1f} away from the start, {content}; it begins at {begins}."


def describe_group(folder: str, group: Sequence[Drift]) -> str:
    """One sentence on the videos of a folder."""
    verdicts = [judge(drift) for drift in group]
    count, distance = sum(each.drifts for each in verdicts), np.median([each.distance for each in verdicts])
    return f"{folder}: {count} of {len(group)} videos drift; colors end {distance:.1f} away from the start (median)."


def format_verdicts(drifts: Sequence[Drift]) -> str:
    """A sentence for each video, or for each folder of many; which of two drifts less."""
    if len(drifts) > MOST_SENTENCES:
        return "\n".join(describe_group(folder, group) for folder, group in group_by_folder(drifts).items())
    names = [Path(drift.name).name for drift in drifts]
    names = names if len(set(names)) == len(names) else [drift.name for drift in drifts]
    lines = [describe(drift, name) for drift, name in zip(drifts, names)]
    if len(drifts) == 2 and any(judge(drift).drifts for drift in drifts):
        (less, near), (more, far) = sorted(
            ((name, judge(drift).distance) for drift, name in zip(drifts, names)), key=lambda each: each[1]
        )
        lines.append(f"{less} ends closer to its start than {more}: {near:.1f} instead of {far:.1f}.")
    return "\n".join(lines)


def format_side_by_side(drifts: Sequence[Drift]) -> str:
    """Two videos as columns, a row for each measure."""
    measures = [drift.measures() for drift in drifts]
    table = [["", *shorten([drift.name for drift in drifts]), "no drift"]]
    table.append(["frames", *(str(drift.num_frames) for drift in drifts), ""])
    for key, title, form, neutral in ROWS:
        table.append([title, *(show(each[key], form) for each in measures), neutral])
    return align(table)


def exceeding(drifts: Sequence[Drift], max_distance: float) -> list[str]:
    """A sentence for each video whose colors end farther away than allowed."""
    distances = {drift.name: judge(drift).distance for drift in drifts}
    return [
        f"{name} has a color distance of {distance:.2f}, more than --max-distance {max_distance:g}."
        for name, distance in distances.items()
        if distance > max_distance
    ]
