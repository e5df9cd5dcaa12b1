# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`make study`: how often and how much trimming helps, over many seeds, each method on the same prompts and noise."""

import argparse
import csv
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/study.csv"))
    args = parser.parse_args()

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    rows, cost = [], {method: np.zeros(2) for method in METHODS}
    run_method(pipe, "plain", sample_prompts(seeds[: args.batch]), seeds[: args.batch], num_chunks=2)  # warm up
    for start in tqdm(range(0, len(seeds), args.batch), desc="batches"):
        batch = seeds[start : start + args.batch]
        prompts = sample_prompts(batch)
        for method in METHODS:
            run = run_method(pipe, method, prompts, batch, args.chunks)
            cost[method] += run.seconds, run.denoiser_calls
            for seed, prompt, frames, decisions in zip(batch, prompts, run.frames, run.decisions):
                drift = summarize_drift(frames, prompt, WORLD["num_frames_per_chunk"])
                triggers = sum(each["trim"] for each in decisions)
                rows.append({"method": method, "seed": seed, "prompt": prompt, "triggers": triggers, **drift})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    print(f"\n{args.seeds} seeds from {args.first_seed}, {args.chunks} chunks; mean [95% bootstrap interval]")
    for measure in MEASURES:
        print(f"\n{measure}")
        plain = np.array([row[measure] for row in by_method["plain"]])
        for method, of_method in by_method.items():
            values = np.array([row[measure] for row in of_method])
            paired = np.isfinite(values) & np.isfinite(plain)
            values, differences = values[paired], (values - plain)[paired]
            low, high = bootstrap(values)
            line = f"  {method:18}{values.mean():8.3f} [{low:.3f}, {high:.3f}]"
            if method != "plain":
                low, high = bootstrap(differences)
                lower = 100 * np.mean(differences < 0)
                line += f"   against plain {differences.mean():+.3f} [{low:+.3f}, {high:+.3f}], lower in {lower:.0f}%"
            print(line if paired.all() else f"{line}   ({(~paired).sum()} without a value left out)")
    print("\ncost")
    for method, of_method in by_method.items():
        triggers = sum(row["triggers"] for row in of_method)
        chunks = len(of_method) * args.chunks
        overhead = cost[method] / cost["plain"]
        print(
            f"  {method:18}triggers in {triggers} of {chunks} chunks ({100 * triggers / chunks:.1f}%), in"
            f" {np.mean([row['triggers'] > 0 for row in of_method]):.0%} of videos; seconds {overhead[0]:.2f}x"
        )
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
