# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The README's moving picture: two typical videos, plain beside held. Of eight videos of fixed seeds that nothing was
tuned on, the two in the middle by how far the colors of the plain rollout's sky end from their start.

    python -m research.evaluation.showcase       # half an hour on two cores; what is generated stays in --work
"""

import argparse
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np

from research.training import travelling
from tokentrim.tokentrim_frames.colors import color_drift, end_of
from tokentrim.tokentrim_frames.comparison import Comparison, save_animation
from tokentrim.tokentrim_frames.output import TokenTrimPipelineOutput, as_uint8

from .experiment import sample_prompts
from .rollouts import ROOT, STAYS, load_pipeline, run_method


SEEDS = range(16000, 16008)
NUM_CHUNKS, TOP = 120, STAYS["travelling-world"]
SIDE, QUALITY, EVERY, RATE = 256, 55, 3, 8  # pixels of a picture; of the WebP; frames for one of it; of it in a second


def generate(method: str, seeds: list[int], work: Path) -> TokenTrimPipelineOutput:
    """The videos of a method; those that an earlier call generated are read."""
    path = work / f"{method}.pickle"
    if not path.exists():
        pipe = load_pipeline(ROOT / "checkpoints" / "travelling-world")
        pipe.vae.enable_slicing()
        pipe.set_progress_bar_config(desc=method)
        output = run_method(pipe, method, sample_prompts(seeds, of=travelling), seeds, NUM_CHUNKS).output
        output.frames = as_uint8(output.frames) / np.float32(255)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(vars(output)))
    return TokenTrimPipelineOutput(**pickle.loads(path.read_bytes()))


def stack(pictures: list[np.ndarray]) -> np.ndarray:
    """Labeled pictures above each other; a label on the first alone."""
    header, width = pictures[0].shape[0] - SIDE, pictures[0].shape[1]
    gap = np.full((8, width, 3), 255, np.uint8)
    return np.concatenate([pictures[0], *(part for picture in pictures[1:] for part in (gap, picture[header:]))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/showcase"), help="what is generated, to go on with")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plain-and-held.webp")
    args = parser.parse_args()
    plain = generate("plain", list(SEEDS), args.work)
    drifts = [end_of(color_drift(as_uint8(video), plain.chunk_frames, TOP)) for video in plain.frames]
    typical = np.argsort(drifts)[len(drifts) // 2 - 1 : len(drifts) // 2 + 1].tolist()
    held = generate("tokentrim_plus", [SEEDS[video] for video in typical], args.work)
    plain = replace(plain, frames=plain.frames[typical], decisions=[plain.decisions[video] for video in typical])
    outputs = {"plain": plain, "tokentrim_plus": held}
    comparisons = [Comparison(outputs, video, TOP) for video in range(len(typical))]
    print("colors of the top 30% of plain, end from start:", ", ".join(f"{drift:.1f}" for drift in drifts))
    for video, comparison in zip(typical, comparisons):
        print(f"seed {SEEDS[video]}", comparison, sep="\n")
    num_frames = sum(plain.chunk_frames)
    frames = [stack([each.picture(frame, SIDE) for each in comparisons]) for frame in range(0, num_frames, EVERY)]
    save_animation(args.out, frames, RATE, QUALITY)
    print(f"{args.out}: {len(frames)} pictures, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
