# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Methods judged by pairs of videos of one prompt and noise: differences, intervals, and a verdict in a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


# With fewer pairs even differences that all point one way are no surprise: 2 in 32 at five, 2 in 64 at six.
FEWEST = 6
SAMPLES = 10_000
DRIFT = "color_distance"  # the measure that decides
SLOWER, LEAPS = (
    0.7,
    0.5,
)  # share of the reference's late / early motion, and cuts a video more, that are worth a warning


def bootstrap(values: Sequence[float] | np.ndarray, num_samples: int = SAMPLES) -> tuple[float, float]:
    """95% bootstrap interval of the mean (percentiles); the value itself if all are equal. The same on each call."""
    values = np.asarray(values, float)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    chosen = np.random.default_rng(0).integers(0, len(values), (num_samples, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Standing:
    """
    How one method does.

    Args:
        name (`str`): of the method.
        videos (`int`): finished ones.
        pairs (`int`): of these, those whose reference is finished too.
        means (`dict`): mean of each measure over the pairs; over all videos if there are no pairs.
        reference (`float`, *optional*): mean drift of the reference in the pairs.
        difference (`float`, *optional*): mean difference of the drift in pairs; negative is less.
        low, high (`float`, *optional*): its 95% interval.
        lower_in (`float`, *optional*): share of the pairs with less drift.
        calls (`float`, *optional*): transformer calls over those of the reference.
        speed (`float`): frames made in a second.
        memory (`float`): largest memory, in bytes.
    """

    name: str
    videos: int
    pairs: int
    means: dict[str, float | None]
    reference: float | None
    difference: float | None
    low: float | None
    high: float | None
    lower_in: float | None
    calls: float | None
    speed: float
    memory: float

    @property
    def is_clear(self) -> bool:
        """Whether its drift differs from the reference's."""
        return self.pairs >= FEWEST and (self.high < 0 or self.low > 0)


def judge_methods(lines: Sequence[Mapping[str, Any]], methods: Sequence[str], reference: str) -> list[Standing]:
    """The standing of each method that has a video, in the order of the plan."""
    by_method = {name: {} for name in methods}
    for line in lines:
        by_method.get(line["method"], {})[line["prompt_number"], line["seed"]] = line
    return [judge(name, mine, by_method[reference], reference) for name, mine in by_method.items() if mine]


def judge(name: str, mine: dict, theirs: dict, reference: str) -> Standing:
    """One method against the reference, by (prompt, seed)."""
    shared = sorted(set(mine) & set(theirs))
    chosen = [mine[key] for key in (shared or sorted(mine))]
    seconds = sum(line["seconds"] for line in chosen)
    speed = sum(line["num_frames"] for line in chosen) / seconds if seconds else 0.0
    base: dict[str, Any] = dict.fromkeys(("reference", "difference", "low", "high", "lower_in", "calls"))
    if shared:
        before = [theirs[key]["measures"][DRIFT] for key in shared]
        base["reference"] = float(np.mean(before))
        base["calls"] = sum(mine[key]["calls"] for key in shared) / sum(theirs[key]["calls"] for key in shared)
        if name != reference:
            differences = np.array([line["measures"][DRIFT] for line in chosen]) - before
            low, high = bootstrap(differences)
            lower_in = float(np.mean(differences < 0))
            base |= {"difference": float(differences.mean()), "low": low, "high": high, "lower_in": lower_in}
    memory = max(line["memory"] for line in chosen)
    return Standing(name, len(mine), len(shared), mean_measures(chosen), **base, speed=speed, memory=memory)


def mean_measures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean of each measure over the videos for which it is defined."""
    names = lines[0]["measures"]
    known = {
        name: [line["measures"][name] for line in lines if line["measures"].get(name) is not None] for name in names
    }
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def tell_verdict(standings: Sequence[Standing], reference: str) -> str:
    """Which method drifts least, in a sentence or two; or that this cannot be told, and why."""
    rivals = [each for each in standings if each.name != reference and each.pairs]
    if not rivals:
        return (
            f"No pair of videos is finished: {reference} and another method are compared on the same prompt and noise."
        )
    best = min(rivals, key=lambda each: each.difference)
    colors = f"colors end {best.means[DRIFT]:.1f} away from the start against {best.reference:.1f} of {reference}"
    interval = f"95% interval of the difference {best.low:+.1f} to {best.high:+.1f}, {best.pairs} videos"
    if best.pairs < FEWEST:
        return (
            f"Too few videos to tell: {best.pairs} of each method so far, and {FEWEST} are needed. Until now {best.name}"
            f" drifts least of those compared with {reference}: {colors}."
        )
    if best.high >= 0:
        return f"On these weights no method drifts measurably less than {reference}. The nearest is {best.name}: {colors}, {interval}."
    warnings = warn(best, next(each for each in standings if each.name == reference))
    return f"On these weights {best.name} drifts least: {colors}, {interval}; {tell_calls(best.calls)}.{warnings}"


def tell_calls(calls: float) -> str:
    if abs(calls - 1) < 0.005:
        return "no extra calls"
    return f"{abs(calls - 1):.0%} {'more' if calls > 1 else 'fewer'} calls"


def warn(best: Standing, base: Standing) -> str:
    """What less drift may have cost: a frozen video does not drift, and one that leaps back ends at its start."""
    told, motion, before = "", best.means["motion_late_to_early"], base.means["motion_late_to_early"]
    if motion is not None and before is not None and motion < SLOWER * before:
        told += f" But its videos slow down: motion at the end is {motion:.2f} of that at the start, {before:.2f} with {base.name}."
    if best.means["cuts"] - base.means["cuts"] > LEAPS:
        told += (
            f" But its videos leap: {best.means['cuts']:.1f} cuts a video, {base.means['cuts']:.1f} with {base.name}."
        )
    return told
