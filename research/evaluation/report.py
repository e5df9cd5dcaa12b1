# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Turn the table of an experiment into its Markdown report and plots."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tokentrim.tools.compare.paired import bootstrap

from .experiment import Experiment, part
from .report_pictures import cases, curves, drift_measure, overview
from .signals import SIGNALS


BASE_CHUNKS = slice(1, 4)  # the chunk that the others are compared with comes before
CONTRASTS = ("L_mean", "a_mean", "b_mean", "L_spread", "saturation", "contrast", "sharpness", "flicker")
MEAN_COLOR = ["L_mean", "a_mean", "b_mean"]  # CIELAB
RECOVERY = 8  # chunks after a defect
RIVALS = ("sink", "corrected afterwards")  # further references, if an experiment has them
CASES = "The five videos whose {} falls most and the five where it falls least, each below its reference:"
OVERVIEW, VIDEOS = "All methods, seed", "Up to ten videos, from seed"
RIVALRY = ("excess_drift", "shape_right")
RELEASING, HELD = "with tolerance 0.085", "tokentrim_plus"  # equal until a video is released
SUMMARY = {
    "background CIEDE2000": ("background_error", "{:.2f}"),
    "object CIEDE2000": ("object_error", "{:.2f}"),
    "shape right": ("shape_right", "{:.0%}"),
    "motion": ("motion", "{:.2f}"),
    "its change": ("motion_change", "{:+.2f}"),
}


def video_table(table: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """One row for each method and video: drift over the last half, and start-end contrasts (first and last 15%)."""
    rows = []
    for (method, seed), video in table.groupby(["method", "seed"], sort=False):
        video = video.sort_values("chunk")
        share = max(1, round(0.15 * len(video)))
        row = {
            "method": method,
            "seed": seed,
            "prompt": video["prompt"].iloc[0],
            **(object_row(video) if "identity_error" in video else {}),
            "color_drift": color_drift(video),
            "flow": video["flow"].mean(),
            "triggers": video["trim"].mean(),
            "quarantined": video["quarantined"].mean(),
            "calls": video["calls"].sum(),
            "keys": video["keys"].mean(),
            "seconds": video["seconds"].sum(),
        }
        if experiment.defects:
            at, error = experiment.defect_chunk, video["identity_error"].to_numpy()
            row["recovery"] = error[at + 1 : at + 1 + RECOVERY].sum()
            row["excess_recovery"] = row["recovery"] - RECOVERY * error[BASE_CHUNKS].mean()
        for name in CONTRASTS:
            values = video[name].to_numpy()
            row[f"contrast_{name}"] = abs(values[:share].mean() - values[-share:].mean())
            row[f"slope_{name}"] = np.polyfit(np.arange(len(values)), values, 1)[0]
        rows.append(row)
    return pd.DataFrame(rows)


def color_drift(video: pd.DataFrame) -> float:
    """CIE76 distance between the mean colors of the first chunk and of the last half."""
    colors = video[MEAN_COLOR].to_numpy()
    return float(np.linalg.norm(colors[len(colors) // 2 :].mean(axis=0) - colors[0]))


def object_row(video: pd.DataFrame) -> dict[str, float]:
    """Measures of the tiny world's checker for one video."""
    half, error = len(video) // 2, video["identity_error"].to_numpy()
    return {
        "excess_drift": error[half:].mean() - error[BASE_CHUNKS].mean(),
        "identity_error": error[half:].mean(),
        "background_error": video["background_error"].iloc[half:].mean(),
        "object_error": video["object_error"].iloc[half:].mean(),
        "area_change": abs(video["area"].iloc[half:].mean() / (video["area"].iloc[:3].mean() or np.nan) - 1),
        "present": video["present"].iloc[half:].mean(),
        "shape_right": video["shape_right"].iloc[half:].mean(),
        "scattered": video["scattered"].iloc[half:].mean(),
        "motion": video["motion"].mean(),
        "motion_change": video["motion"].iloc[half:].mean() - video["motion"].iloc[BASE_CHUNKS].mean(),
    }


def paired(videos: pd.DataFrame, measure: str, method: str, reference: str) -> np.ndarray:
    """Differences video by video, without videos that lack a value."""
    by_method = {name: videos[videos["method"] == name].set_index("seed")[measure] for name in (method, reference)}
    return (by_method[method] - by_method[reference]).dropna().to_numpy()


def summary(table: pd.DataFrame, videos: pd.DataFrame, methods: list[str], reference: str) -> str:
    """A Markdown table of the tiny world's measures and costs, a row for each method. Peak motion is the motion in the
    chunk in which all videos together move most."""
    names = ["excess drift", f"against {reference} [95%]", *SUMMARY, "peak motion, chunk", "frames a query", "calls"]
    lines = [f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    means = videos.groupby("method").mean(numeric_only=True)
    for method in methods:
        against = ""
        if method != reference:
            differences = paired(videos, "excess_drift", method, reference)
            against = "{:+.4f} [{:+.4f}, {:+.4f}]".format(differences.mean(), *bootstrap(differences))
        shown = [form.format(means.loc[method, measure]) for measure, form in SUMMARY.values()]
        motion = table[table["method"] == method].groupby("chunk")["motion"].mean()
        cost = [
            f"{means.loc[method, 'keys']:.1f}",
            f"{means.loc[method, 'calls'] / means.loc[reference, 'calls']:.3f}x",
        ]
        peak = f"{motion.max():.2f}, {motion.idxmax()}"
        cells = [method, f"{means.loc[method, 'excess_drift']:.4f}", against, *shown, peak, *cost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison(videos: pd.DataFrame, measure: str, methods: list[str], reference: str) -> str:
    """A Markdown table of one measure."""
    lines = [
        f"| {measure.replace('_', ' ')} | mean | against {reference} [95%] | change | lower in | videos |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = videos.loc[videos["method"] == reference, measure].mean()
    for method in methods:
        mean = videos.loc[videos["method"] == method, measure].mean()
        if method == reference:
            lines.append(f"| {method} | {mean:.4g} | | | | {(videos['method'] == method).sum()} |")
            continue
        differences = paired(videos, measure, method, reference)
        low, high = bootstrap(differences)
        change = f"{differences.mean() / base:+.0%}" if base else ""
        lines.append(
            f"| {method} | {mean:.4g} | {differences.mean():+.4g} [{low:+.4g}, {high:+.4g}] | {change} "
            f"| {np.mean(differences < 0):.0%} | {len(differences)} |"
        )
    return "\n".join(lines)


def releases(videos: pd.DataFrame, measure: str, reference: str) -> str:
    """A Markdown table of one measure, separately for videos that `RELEASING` released and for those that it held, which
    equal the videos of `HELD`."""
    by_method = {name: videos[videos["method"] == name].set_index("seed") for name in (reference, RELEASING, HELD)}
    released = by_method[RELEASING]["color_drift"] != by_method[HELD]["color_drift"]
    lines = [f"| {measure.replace('_', ' ')} | videos | {' | '.join(by_method)} |", "| --- " * 5 + "|"]
    for group, chosen in (("released", released), ("held", ~released)):
        means = [f"{rows.loc[chosen, measure].mean():.4g}" if chosen.any() else "" for rows in by_method.values()]
        lines.append(f"| {group} {RELEASING} | {chosen.sum()} | {' | '.join(means)} |")
    return "\n".join(lines)


def area_under_curve(signal: np.ndarray, bad: np.ndarray) -> float:
    """Probability that a bad chunk has a larger signal than a good one; ties count half."""
    ranks = stats.rankdata(signal)
    return (ranks[bad].sum() - bad.sum() * (bad.sum() + 1) / 2) / (bad.sum() * (~bad).sum())


def detectors(table: pd.DataFrame, method: str, experiment: Experiment) -> str:
    """How well each signal detects bad chunks in the rollouts of one method. Bad chunks have an identity error above
    twice that of chunks 1 to 3 of their video, or are the painted ones among the chunks up to then."""
    chunks = table[(table["method"] == method) & (table["chunk"] > 0)]
    if experiment.defects:
        chunks = chunks[chunks["chunk"] <= experiment.defect_chunk]
        bad, what = chunks["chunk"] == experiment.defect_chunk, "the painted chunk among those before it"
    else:
        first = chunks[chunks["chunk"] < 4].groupby("seed")["identity_error"].mean()
        bad = chunks["identity_error"] > 2 * chunks["seed"].map(first)
        what = "an identity error above twice that of chunks 1 to 3 of the video"
    lines = [
        f"| signal, on {method} | AUC | rank correlation with identity error | with motion |",
        "| --- | --- | --- | --- |",
    ]
    for name in SIGNALS:
        lines.append(
            f"| {name.replace('_', ' ')} | {area_under_curve(chunks[name].to_numpy(), bad.to_numpy()):.3f} "
            f"| {chunks[name].corr(chunks['identity_error'], method='spearman'):+.2f} "
            f"| {chunks[name].corr(chunks['motion'], method='spearman'):+.2f} |"
        )
    lines.append(f"\nBad is {what}: {bad.mean():.0%} of the chunks.")
    return "\n".join(lines)


def write_report(table: pd.DataFrame, experiment: Experiment, out: Path) -> str:
    """Write `report.md`, `videos.csv`, `curves.png` and film strips to `out`. Returns the report."""
    methods, reference = list(experiment.methods), next(iter(experiment.methods))
    videos = video_table(table, experiment)
    videos.to_csv(out / "videos.csv", index=False, float_format="%.5g")
    has_object = "excess_drift" in videos
    shown = {"L_mean": "lightness", "saturation": "saturation", "contrast": "contrast", "flow": "optical flow"}
    if has_object:
        shown = {"identity_error": "identity error", "background_error": "background\nCIEDE2000", "motion": "motion"}
    curves(table, shown).savefig(out / "curves.png", dpi=110)
    pictures = []
    for method in methods[1:] if experiment.cases is None else experiment.cases:
        pictures.append(f"cases-{part(out, method, [0]).stem.removesuffix('-0-0')}.jpg")
        cases(videos, experiment, out, method, reference).savefig(out / pictures[-1], dpi=80)
    overview(experiment, out).savefig(out / "overview.jpg", dpi=80)
    measures = ["excess_drift", "color_drift", "identity_error", "background_error", "object_error"]
    measures += ["motion", "motion_change", "flow", "present", "shape_right", "scattered", "area_change"]
    measures += [f"contrast_{name}" for name in CONTRASTS]
    if experiment.defects:
        measures = ["recovery", "excess_recovery", *measures]
    measures = [measure for measure in measures if measure in videos]
    others = [method for method in methods[1:] if method in RIVALS]
    told = [drift_measure(videos), "background_error"] if {RELEASING, HELD} <= set(methods) else []  # by release
    source = f"prompts of `{experiment.prompts_file}`"
    if experiment.prompts_file is None:
        source = f"scenes {', '.join(experiment.scenes)}"
    sections = [
        f"# {experiment.name}",
        f"`python -m research.evaluation.run --config research/evaluation/configs/{experiment.name}.yaml`: {experiment.num_seeds} seeds "
        f"from {experiment.first_seed}, {experiment.num_chunks} chunks, {source}, checkpoint `{experiment.checkpoint}`.",
        *([summary(table, videos, methods, reference)] if has_object else []),
        *(comparison(videos, measure, methods, reference) for measure in measures),
        *(comparison(videos, measure, methods, other) for other in others for measure in RIVALRY if has_object),
        *(releases(videos, measure, reference) for measure in told if measure in videos),
        *([areas_by_defect(table, experiment), alarms(table, experiment)] if experiment.defects else []),
        cost(table, videos, methods, reference),
        *([detectors(table, reference, experiment)] if has_object else []),
        "![curves](curves.png)",
        f"{OVERVIEW if len(methods) > 1 else VIDEOS} {experiment.first_seed}:",
        "![overview](overview.jpg)",
        *([CASES.format(drift_measure(videos).replace("_", " "))] if pictures else []),
        *(f"![{name}]({name})" for name in pictures),
    ]
    report = "\n\n".join(sections) + "\n"
    (out / "report.md").write_text(report)
    return report


def alarms(table: pd.DataFrame, experiment: Experiment) -> str:
    """How often each method trims or quarantines: before the defect, at it, one chunk later, and after that."""
    lines = ["| chunks with an alarm | before the defect | at the defect | one later | after |", "| --- " * 5 + "|"]
    since = table["chunk"] - experiment.defect_chunk
    alarm, before = table["trim"] | table["quarantined"], (since < 0) & (table["chunk"] > 0)
    for method in experiment.methods:
        ours = table["method"] == method
        shares = [alarm[ours & when].mean() for when in (before, since == 0, since == 1, since > 1)]
        lines.append(f"| {method} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def areas_by_defect(table: pd.DataFrame, experiment: Experiment) -> str:
    """Area under the identity error in the chunks after each kind of defect."""
    lines = [f"| area, {RECOVERY} chunks | " + " | ".join(experiment.defects) + " |"]
    lines.append("| --- " * (len(experiment.defects) + 1) + "|")
    since = table["chunk"] - experiment.defect_chunk
    after = table[(since > 0) & (since <= RECOVERY)]
    areas = after.groupby(["method", "defect"])["identity_error"].mean() * RECOVERY
    for method in experiment.methods:
        lines.append(f"| {method} | " + " | ".join(f"{areas[method, kind]:.3f}" for kind in experiment.defects) + " |")
    return "\n".join(lines)


def cost(table: pd.DataFrame, videos: pd.DataFrame, methods: list[str], reference: str) -> str:
    """Triggers, and the cost of a rollout relative to the reference."""
    lines = [
        "| cost | chunks trimmed | videos trimmed | chunks quarantined | transformer calls | frames a query | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = videos[videos["method"] == reference]
    for method in methods:
        rows = videos[videos["method"] == method]
        lines.append(
            f"| {method} | {rows['triggers'].mean():.1%} | {(rows['triggers'] > 0).mean():.0%} "
            f"| {rows['quarantined'].mean():.1%} "
            f"| {rows['calls'].sum() / base['calls'].sum():.3f}x | {rows['keys'].mean():.1f} "
            f"| {rows['seconds'].sum() / base['seconds'].sum():.2f}x |"
        )
    return "\n".join(lines)
