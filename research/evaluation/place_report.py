# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How far videos of the world of photographs are from their places over time, beside true videos.

python -m research.evaluation.place_report research/runs/photographs_200

Reads what `research.evaluation.run` wrote. True videos of the same prompts go through the autoencoder, which gives the
floor of every measure. Means over videos, with 95% intervals by resampling videos.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKLWan

from research.training.autoencoder import decode, encode
from research.training.photographs import Camera, parse, render

from .places import measure_places
from .report import bootstrap
from .rollouts import ROOT


CHUNKS = (0, 5, 20, 40, 100, 200)
MEASURES = ("structure_error", "color_error", "feature_error", "other_share")


@torch.no_grad()
def true_frames(vae: AutoencoderKLWan, prompt: str, seed: int, times: list[int]) -> np.ndarray:
    """Frames of a true video through the autoencoder, (N, H, W, 3) in [0, 1]."""
    scene = parse(prompt)
    camera = Camera.sample(scene, torch.Generator().manual_seed(seed))
    frames = torch.cat([render(scene, camera, 1, time) for time in times])
    decoded = decode(vae, encode(vae, frames[:, :, None] * 2 - 1)[0])[:, :, 0]
    return ((decoded + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def measure_true(prompts: dict[int, str], checkpoint: Path, chunks: list[int], per_chunk: int) -> pd.DataFrame:
    """The measures of true videos, one row for each seed and chunk."""
    vae, rows = AutoencoderKLWan.from_pretrained(checkpoint / "vae").eval(), []
    for seed, prompt in prompts.items():
        frames = true_frames(vae, prompt, seed, [chunk * per_chunk + per_chunk // 2 for chunk in chunks])
        for chunk, row in zip(chunks, measure_places(frames, prompt)):
            rows.append({"method": "true, through the autoencoder", "seed": seed, "chunk": chunk, **row})
    return pd.DataFrame(rows)


def format_interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():.3f}"
    return "{:.3f} [{:.3f}, {:.3f}]".format(values.mean(), *bootstrap(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder that research.evaluation.run wrote")
    args = parser.parse_args()
    table = pd.read_csv(args.run / "table.csv.gz")
    checkpoint = ROOT / json.loads((args.run / "experiment.json").read_text())["checkpoint"]
    per_chunk = json.loads((checkpoint / "model_index.json").read_text())["num_frames_per_chunk"]
    last = table["chunk"].max()
    chunks = sorted({min(chunk, last) for chunk in CHUNKS})
    prompts = dict(table.drop_duplicates("seed")[["seed", "prompt"]].itertuples(index=False))
    table = pd.concat([measure_true(prompts, checkpoint, chunks, per_chunk), table])
    for measure in MEASURES:
        print(f"\n| {measure.replace('_', ' ')} | " + " | ".join(f"chunk {chunk}" for chunk in chunks) + " |")
        print("| --- " * (1 + len(chunks)) + "|")
        for method, rows in table.groupby("method", sort=False):
            cells = [format_interval(rows.loc[rows["chunk"] == chunk, measure].to_numpy()) for chunk in chunks]
            print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
