# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`make study`: how often and how much trimming helps, over many seeds, each method on the same prompts and noise."""

import argparse
import csv
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.world import CHANGES, Scene

from .measures import summarize_drift
from .rollouts import METHODS, WORLD, load_pipeline, run_method


MEASURES = ("background_drift", "object_drift", "object_lost", "motion")


def sample_prompts(seeds: list[int]) -> list[str]:
    """A prompt for each seed, of scenes in which nothing but the object is meant to change."""
    prompts = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scene = Scene.sample(generator)
        while scene.change in CHANGES:
            scene = Scene.sample(generator)
        prompts.append(scene.prompt)
    return prompts


def bootstrap(values: np.ndarray, num_samples: int = 10_000) -> tuple[float, float]:
    """95% interval of the mean, by resampling videos."""
    generator = np.random.default_rng(0)
    means = values[generator.integers(len(values), size=(num_samples, len(values)))].mean(axis=1)
    return tuple(np.quantile(means, (0.025, 0.975)))


def run_batch(seeds: list[int], num_chunks: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Every method on the same prompts and noise: a row for each method and seed, and (seconds, calls) by method."""
    torch.set_num_threads(1)  # the model is tiny: one process for each core is faster than one with all of them
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = sample_prompts(seeds)
    run_method(pipe, "plain", prompts, seeds, num_chunks=2)  # warm up
    rows, cost = [], {}
    for method in METHODS:
        run = run_method(pipe, method, prompts, seeds, num_chunks)
        cost[method] = np.array([run.seconds, run.denoiser_calls])
        for seed, prompt, frames, decisions in zip(seeds, prompts, run.frames, run.decisions):
            drift = summarize_drift(frames, prompt, WORLD["num_frames_per_chunk"])
            triggers = sum(each["trim"] for each in decisions)
            rows.append({"method": method, "seed": seed, "prompt": prompt, "triggers": triggers, **drift})
    return rows, cost


def report(rows: list[dict], cost: dict[str, np.ndarray], num_chunks: int) -> str:
    """The table: each measure by method, paired differences to plain, triggers and cost."""
    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"{len(seeds)} seeds from {seeds[0]}, {num_chunks} chunks; mean [95% bootstrap interval]"]
    for measure in MEASURES:
        lines += ["", measure]
        plain = np.array([row[measure] for row in by_method["plain"]])
        for method, of_method in by_method.items():
            values = np.array([row[measure] for row in of_method])
            paired = np.isfinite(values) & np.isfinite(plain)
            values, differences = values[paired], (values - plain)[paired]
            line = "  {:20}{:8.3f} [{:.3f}, {:.3f}]".format(method, values.mean(), *bootstrap(values))
            if method != "plain":
                line += "   against plain {:+.3f} [{:+.3f}, {:+.3f}]".format(
                    differences.mean(), *bootstrap(differences)
                )
                line += f", lower in {np.mean(differences < 0):.0%} of videos"
            lines.append(line if paired.all() else f"{line} ({(~paired).sum()} without a value left out)")
    lines += ["", "triggers and cost"]
    for method, of_method in by_method.items():
        triggers, chunks = sum(row["triggers"] for row in of_method), len(of_method) * num_chunks
        videos = np.mean([row["triggers"] > 0 for row in of_method])
        line = (
            f"  {method:20}{triggers} triggers in {chunks} chunks ({triggers / chunks:.1%}), in {videos:.0%} of videos"
        )
        lines.append(f"{line}; seconds {cost[method][0] / cost['plain'][0]:.2f}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("evaluation/results"))
    args = parser.parse_args()

    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    batches = [seeds[start : start + args.batch] for start in range(0, len(seeds), args.batch)]
    rows, cost = [], {method: np.zeros(2) for method in METHODS}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        done = pool.map(run_batch, batches, [args.chunks] * len(batches))
        for of_batch, cost_of_batch in tqdm(done, total=len(batches), desc="batches"):
            rows += of_batch
            cost = {method: cost[method] + cost_of_batch[method] for method in METHODS}

    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = report(rows, cost, args.chunks)
    (args.out / "study.txt").write_text(table + "\n")
    print(f"\n{table}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
