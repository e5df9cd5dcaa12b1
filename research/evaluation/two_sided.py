# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Infidelity and life of an experiment's videos: `python -m research.evaluation.two_sided --config research/evaluation/configs/x.yaml`.

Reads the folder of `research.evaluation.run`, renders true videos of the same prompts (twice: the second set gives the
floor), and writes two_sided.md, two_sided.json and two_sided.png to it.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .experiment import Experiment, part
from .fidelity import LOOKS, Infidelity, Looks, interval, life, still_error
from .measures import mean_look
from .rollouts import ROOT
from .worlds import STILL_ROWS, render_chunks


FLOOR = "true videos"
HIDDEN_SEEDS = (1_000_000, 2_000_000)  # added to a video's seed, for the hidden rest of true videos
FRAMES_PER_CHUNK = 3  # of every world
MEASURES = {
    "growth": "growth of infidelity",
    "share": "of the first method's",
    "life": "life",
}


def load_videos(experiment: Experiment, out: Path) -> dict[str, np.ndarray]:
    """Middle frames of each method, uint8 (videos, chunks, H, W, 3), in the order of the seeds."""
    videos: dict[str, list] = {method: [] for method in experiment.methods}
    for method, seeds in experiment.jobs():
        videos[method].append(np.load(part(out, method, seeds).with_suffix(".npz"))["frames"])
    return {method: np.concatenate(parts) for method, parts in videos.items()}


def render_true(experiment: Experiment, hidden_seed: int) -> np.ndarray:
    """True videos, uint8 (videos, chunks, 2, H, W, 3)."""
    seeds = range(experiment.first_seed, experiment.first_seed + experiment.num_seeds)
    return np.stack(
        [
            render_chunks(experiment.world, prompt, hidden_seed + seed, experiment.num_chunks, FRAMES_PER_CHUNK)
            for seed, prompt in zip(seeds, experiment.prompts(seeds))
        ]
    )


def measure(videos: dict[str, np.ndarray], true: np.ndarray) -> dict:
    """For each kind of look and each method: infidelity over time, its growth, life with intervals, and growth as a share
    of the first method's. Frames, also of true videos, are (videos, chunks, H, W, 3)."""
    results = {}
    for kind, look in LOOKS.items():
        of_true = look(true)
        reference, results[kind], first = Looks.of(of_true, of_true), {}, None
        for method, frames in videos.items():
            looks = Looks.of(look(frames), of_true)
            infidelity = Infidelity(looks, reference)
            first = first or infidelity
            results[kind][method] = {
                "over_time": infidelity.over_time().tolist(),
                "growth": interval(infidelity.growth, len(frames)),
                "share": interval(lambda chosen: infidelity.growth(chosen) / first.growth(chosen), len(frames)),
                "life": interval(lambda chosen: life(looks, reference, chosen), len(frames)),
                "life_over_time": (looks.travel().mean(axis=0)[1:] / reference.travel().mean(axis=0)[1:]).tolist(),
            }
    return results


def motions(experiment: Experiment, out: Path, true: np.ndarray) -> dict[str, float]:
    """Optical flow from frame to frame over the last half, relative to true videos."""
    half = experiment.num_chunks // 2
    of_true = np.mean([mean_look(pair)["motion"] for video in true for pair in video[half:]])
    table = pd.concat([pd.read_csv(part(out, *job)) for job in experiment.jobs()])
    flow = table[table["chunk"] >= half].groupby("method")["flow"].mean()
    return {method: float(flow[method] / of_true) for method in experiment.methods}


def skies(experiment: Experiment, videos: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """CIEDE2000 distance of the sky over the last half, with its interval, in a world with a sky."""
    rows, sky = STILL_ROWS.get(experiment.world), {}
    for method, frames in videos.items() if rows else ():
        errors = still_error(frames, rows)
        sky[method] = interval(lambda chosen: errors[chosen].mean(), len(errors))
    return sky


def report(experiment: Experiment, results: dict, motion: dict[str, float], sky: dict[str, tuple]) -> str:
    def cell(values: tuple[float, float, float]) -> str:
        return "{:.3g} [{:.3g}, {:.3g}]".format(*values)

    lines = [
        f"# {experiment.name}: fidelity and life",
        f"{experiment.num_seeds} videos of {experiment.num_chunks} chunks, checkpoint `{experiment.checkpoint}`. Growth of "
        "infidelity: of the last half over the first eighth. Motion: over the last half, 1 is the world's."
        + (" Sky: CIEDE2000 distance of its color to the first chunk, over the last half." if sky else ""),
        "",
        "| method | motion | "
        + ("sky | " if sky else "")
        + " | ".join(f"{title}, {kind}" for kind in results for title in MEASURES.values())
        + " |",
        "| --- " * (2 + bool(sky) + len(results) * len(MEASURES)) + "|",
    ]
    for method in [*experiment.methods, FLOOR]:
        cells = [cell(sky[method])] if sky else []
        cells += [cell(results[kind][method][measure]) for kind in results for measure in MEASURES]
        lines.append(f"| {method} | {motion.get(method, 1):.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Figure:
    """Plot infidelity and life over time, a column for each kind of look."""
    figure = Figure(figsize=(5 * len(results), 5), layout="constrained")
    axes = figure.subplots(2, len(results), sharex=True, squeeze=False)
    for (top, bottom), (kind, methods) in zip(axes.T, results.items()):
        for method, result in methods.items():
            style = {"color": "0.5", "linestyle": ":"} if method == FLOOR else {}
            for axis, values in ((top, result["over_time"]), (bottom, result["life_over_time"])):
                axis.plot(np.linspace(0, 1, len(values)), values, label=method, **style)
        bottom.axhline(1, color="0.8", linewidth=0.8)
        top.set(title=kind, ylabel="infidelity")
        bottom.set(xlabel="time, share of the video", ylabel="life", ylim=(0, None))
    axes[0, 0].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="an experiment, research/evaluation/configs/*.yaml")
    parser.add_argument("--out", type=Path, help="folder of research.evaluation.run; default: research/runs/<name>")
    parser.add_argument("--methods", nargs="+", help="methods of the experiment; shares refer to the first")
    args = parser.parse_args()
    experiment = Experiment.load(args.config)
    if unknown := set(args.methods or ()) - set(experiment.methods):
        parser.error(f"unknown --methods {', '.join(sorted(unknown))}; there are {', '.join(experiment.methods)}")
    chosen = {name: experiment.methods[name] for name in args.methods or experiment.methods}
    experiment = replace(experiment, methods=chosen)
    if experiment.world is None:
        parser.error("a `prompts_file` has no true videos; `tokentrim drift` measures without them")
    out = (args.out or ROOT / "research" / "runs" / experiment.name).resolve()
    true, again = (render_true(experiment, hidden_seed) for hidden_seed in HIDDEN_SEEDS)
    videos = load_videos(experiment, out) | {FLOOR: again[:, :, 0]}
    results, sky = measure(videos, true[:, :, 0]), skies(experiment, videos)
    motion = motions(experiment, out, true)
    (out / "two_sided.json").write_text(json.dumps({"motion": motion, "sky": sky, **results}, indent=1))
    plot(results).savefig(out / "two_sided.png", dpi=110)
    (out / "two_sided.md").write_text(text := report(experiment, results, motion, sky))
    print(text)


if __name__ == "__main__":
    main()
