# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How much videos drift: measured, and as a table, JSON or CSV."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path

import cv2
import numpy as np

from ..tokentrim_writing import write_whole
from .measures import (
    LOOKS,
    NUM_SEGMENTS,
    Timeline,
    color_distance,
    color_histogram,
    color_similarity,
    fit_slope,
    is_cut,
    measure_look,
    reduce,
    start_and_end,
    video_drift_error,
)


MAX_THUMBNAILS, THUMBNAIL_HEIGHT = 128, 96
# A video drifts if its colors end farther away than this, and than twice what its content moves. 31 of 32 rendered clips
# without drift end less than 0.42 away (docs/drift.md).
SMALLEST, CONTENT_FACTOR = 1.0, 2.0


@dataclass(frozen=True)
class Drift:
    """What is known of one video.

    Args:
        name (`str`): its path.
        num_frames (`int`): its frames.
        ends (`np.ndarray`): the frame behind the last one of each segment, (segments,).
        looks (`np.ndarray`): mean look of each segment, (segments, 5).
        histograms (`np.ndarray`): mean color histogram of each segment, (segments, 512).
        thumbnails (`list[np.ndarray]`): small frames, evenly spaced.
        cuts (`int`): frames that show another picture than the one before.
        fps (`float`, *optional*): frames per second, where the file says it.
        prompt (`str`, *optional*): what the video was made of, where a record beside it says it.
    """

    name: str
    num_frames: int
    ends: np.ndarray
    looks: np.ndarray
    histograms: np.ndarray
    thumbnails: list[np.ndarray]
    cuts: int = 0
    fps: float | None = None
    prompt: str | None = None

    def similarities(self) -> np.ndarray:
        """Colour similarity of each segment to the start, (segments,)."""
        return color_similarity(self.histograms, start_and_end(self.histograms)[0])

    def distances(self) -> np.ndarray:
        """Color distance of each segment to the start, (segments,)."""
        start, _ = start_and_end(self.histograms)
        return np.array([color_distance(start, each) for each in self.histograms])

    def measures(self) -> dict[str, float | None]:
        """Every measure by name; None where it is not defined."""
        similarities, neighbors = self.similarities(), color_similarity(self.histograms[1:], self.histograms[:-1])
        worst = int(similarities.argmin())
        measures = {
            "color_similarity": float(color_similarity(*start_and_end(self.histograms))),
            "color_similarity_of_neighbors": float(np.median(neighbors)),
            "color_distance": color_distance(*start_and_end(self.histograms)),
            "worst_similarity": float(similarities[worst]),
            "worst_first_frame": int(self.ends[worst - 1]) if worst else 0,
            "worst_last_frame": int(self.ends[worst]) - 1,
            "cuts": self.cuts,
        }
        for look, values, start, end in zip(LOOKS, self.looks.T, *start_and_end(self.looks)):
            measures |= {
                f"{look}_start": float(start),
                f"{look}_end": float(end),
                f"{look}_start_end_contrast": float(abs(end - start)),
                f"{look}_slope": fit_slope(values),
                f"{look}_vde": video_drift_error(values),
            }
        start, end = measures["motion_start"], measures["motion_end"]
        return measures | {"motion_late_to_early": end / start if start else None}


def measure_video(
    name: str, frames: Iterable[np.ndarray], fps: float | None = None, prompt: str | None = None
) -> Drift:
    """
    Read a video once, with two frames in memory at a time.

    Args:
        name (`str`): for reports.
        frames (`Iterable[np.ndarray]`): uint8 (H, W, 3).
        fps (`float`, *optional*), prompt (`str`, *optional*): see [`Drift`].

    Raises:
        `ValueError`: there are fewer than 21 frames.
    """
    looks, histograms = Timeline(), Timeline()
    thumbnails, spacing, number, cuts = [], 1, -1, 0
    for number, (before, frame) in enumerate(pairwise(map(reduce, frames))):
        looks.add(measure_look(frame, before))
        histograms.add(color_histogram(frame))
        cuts += is_cut(frame, before)
        if number % spacing == 0:
            if len(thumbnails) == MAX_THUMBNAILS:
                thumbnails, spacing = thumbnails[::2], 2 * spacing
            thumbnails.append(make_thumbnail(frame))
    num_frames = number + 2  # the first one has no motion: it only tells that of the second
    if num_frames <= NUM_SEGMENTS:
        raise ValueError(f"{name} has fewer than {NUM_SEGMENTS + 1} frames, too few to measure drift.")
    (looks, ends), (histograms, _) = looks.split(NUM_SEGMENTS), histograms.split(NUM_SEGMENTS)
    return Drift(name, num_frames, ends + 1, looks, histograms, thumbnails, cuts, fps, prompt)


@dataclass(frozen=True)
class Verdict:
    """Whether a video drifts.

    Args:
        distance (`float`): of the colors at the end from those at the start, in % of black to white.
        content (`float`): what its content alone moves them: the median distance of consecutive segments.
        first_frame (`int`, *optional*): from which on all colors are too far from the start; `None` without drift.
    """

    distance: float
    content: float
    first_frame: int | None

    @property
    def drifts(self) -> bool:
        return self.first_frame is not None


def judge(drift: Drift) -> Verdict:
    """
    The verdict on one video.

    It drifts if its colors end farther from the start than `SMALLEST`, and than `CONTENT_FACTOR` times what its content
    moves. It begins with the first segment from which on this holds up to the end.
    """
    start, end = start_and_end(drift.histograms)
    pairs = zip(drift.histograms, drift.histograms[1:])
    content = float(np.median([color_distance(*pair) for pair in pairs]))
    distance, limit = color_distance(start, end), max(SMALLEST, CONTENT_FACTOR * content)
    if distance <= limit:
        return Verdict(distance, content, None)
    near = [number for number, each in enumerate(drift.distances()) if each <= limit]
    first = min(near[-1] + 1 if near else 0, len(drift.histograms) - 1)
    return Verdict(distance, content, int(drift.ends[first - 1]) if first else 0)


def make_thumbnail(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    size = (max(round(width * THUMBNAIL_HEIGHT / height), 1), THUMBNAIL_HEIGHT)
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def measure_convergence(drifts: Sequence[Drift]) -> dict[str, float | None]:
    """Whether videos grow alike: how different the colors of videos of different prompts are at the start and at the end,
    and by how much less, in percent; None without two such videos, or where they begin alike."""
    pairs = different_pairs(drifts)
    if not pairs:
        return {"spread_start": None, "spread_end": None, "convergence": None}
    ends = [start_and_end(drift.histograms) for drift in drifts]
    start, end = (np.mean([color_distance(ends[a][when], ends[b][when]) for a, b in pairs]) for when in (0, 1))
    convergence = 100 * (1 - end / start) if start else None
    return {"spread_start": float(start), "spread_end": float(end), "convergence": convergence and float(convergence)}


def different_pairs(drifts: Sequence[Drift]) -> list[tuple[int, int]]:
    """Pairs of videos that are not known to have the same prompt: those would be alike from the start."""
    prompts = [drift.prompt for drift in drifts]
    pairs = combinations(range(len(drifts)), 2)
    return [(a, b) for a, b in pairs if prompts[a] is None or prompts[a] != prompts[b]]


# Reports


def write_json(path: Path, drifts: Sequence[Drift]) -> None:
    """All measures, and the values of all segments that they are made of."""
    videos = []
    for drift in drifts:
        segments = {"end": drift.ends, "color_similarity": drift.similarities()} | dict(zip(LOOKS, drift.looks.T))
        segments = {name: values.tolist() for name, values in segments.items()}
        about = {"video": drift.name, "num_frames": drift.num_frames}
        verdict = {"drifts": judge(drift).drifts, **asdict(judge(drift))}
        videos.append({**about, "verdict": verdict, "measures": drift.measures(), "segments": segments})
    convergence = {folder: measure_convergence(group) for folder, group in group_by_folder(drifts).items()}
    write_whole(path, json.dumps({"videos": videos, "convergence": convergence}, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, drifts: Sequence[Drift]) -> None:
    """A row of all measures for each video; what is not defined is empty."""
    rows = [{"video": drift.name, "num_frames": drift.num_frames, **drift.measures()} for drift in drifts]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, table.getvalue())


def format_report(drifts: Sequence[Drift]) -> str:
    """Tables with a row for each video and medians of each folder with three or more, and whether its videos grow alike."""
    names = dict(zip((drift.name for drift in drifts), shorten([drift.name for drift in drifts])))
    rows, grown = [], []
    for folder, group in group_by_folder(drifts).items():
        measures = [drift.measures() for drift in group]
        rows += [(names[drift.name], str(drift.num_frames), each) for drift, each in zip(group, measures)]
        if len(group) > 2:
            rows.append((f"median of {folder}", "", medians(measures)))
        if different_pairs(group):
            spread = measure_convergence(group)
            grown.append(
                [folder, *(show(value, "+.1f" if key == "convergence" else ".1f") for key, value in spread.items())]
            )

    colors = [["", "frames", "similarity", "neighbors", "distance", "worst", "at frames", "motion"]]
    for name, num_frames, measures in rows:
        at_frames = "{worst_first_frame}-{worst_last_frame}".format(**measures) if num_frames else ""
        percents = ("color_similarity", "color_similarity_of_neighbors", "color_distance", "worst_similarity")
        percents = [show(measures[key], ".1f") for key in percents]
        colors.append([name, num_frames, *percents, at_frames, show(measures["motion_late_to_early"], ".2f")])
    parts = [
        "Colors at the end: similarity to the start (100 is no drift), and of neighboring twentieths of the video (what its",
        "content costs); distance to the start (0 is no drift); the twentieth that is worst. Late / early motion.",
        align(colors),
    ]
    for title, suffix, forms in (
        ("Slopes: signed change over the video.", "slope", ("+.3f", "+.4f")),
        ("Start-end contrast: change from the first to the last 15%.", "start_end_contrast", (".3f", ".4f")),
        ("VDE: weighted relative change of ten chunks to the first one.", "vde", (".2f", ".2f")),
    ):
        table = [["", *LOOKS]]
        for name, _, measures in rows:
            table.append([name, *(show(measures[f"{look}_{suffix}"], forms[look == "motion"]) for look in LOOKS)])
        parts += ["", title, align(table)]
    if grown:
        title = (
            "Convergence: color distance between a folder's videos of different prompts, and its fall in %. Above 0, they grow"
            " alike."
        )
        parts += ["", title, align([["", "start", "end", "convergence"], *grown])]
    return "\n".join(parts)


def group_by_folder(drifts: Sequence[Drift]) -> dict[str, list[Drift]]:
    groups = {}
    for drift in drifts:
        groups.setdefault(Path(drift.name).parent.as_posix(), []).append(drift)
    return groups


def medians(measures: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """The median of each measure over the videos for which it is defined."""
    known = {key: [each[key] for each in measures if each[key] is not None] for key in measures[0]}
    return {key: float(np.median(values)) if values else None for key, values in known.items()}


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def align(table: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they have to be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in table
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def shorten(names: Sequence[str], longest: int = 40) -> list[str]:
    """Names without the folder that all share, without ending, and cut in the middle."""
    names = [Path(name).with_suffix("").as_posix() for name in names]
    parents = {name.rpartition("/")[0] for name in names}
    if len(parents) == 1:
        names = [name.rpartition("/")[2] for name in names]
    half = longest // 2 - 1
    return [name if len(name) <= longest else f"{name[:half]}..{name[-half:]}" for name in names]
