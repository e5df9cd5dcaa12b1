# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The README's moving picture: two typical videos, plain beside held. Of eight videos of fixed seeds that nothing was
tuned on, the two in the middle by how far the colors of the plain rollout end from their start.

    python -m research.evaluation.showcase       # half an hour on two cores; what is generated stays in --work
"""

import argparse
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from research.training import travelling
from tokentrim.tokentrim_frames.colors import color_drift, end_of
from tokentrim.tokentrim_frames.comparison import Comparison
from tokentrim.tokentrim_frames.output import TokenTrimPipelineOutput, as_uint8

from .experiment import sample_prompts
from .rollouts import ROOT, load_pipeline, run_method


METHODS = ("plain", "tokentrim_plus")
SEEDS = range(16000, 16008)
NUM_CHUNKS = 120


def generate(method: str, work: Path) -> TokenTrimPipelineOutput:
    """All videos of a method; those that an earlier call generated are read."""
    path = work / f"{method}.pickle"
    if not path.exists():
        pipe = load_pipeline(ROOT / "checkpoints" / "travelling-world")
        pipe.vae.enable_slicing()
        pipe.set_progress_bar_config(desc=method)
        prompts = sample_prompts(list(SEEDS), of=travelling)
        output = run_method(pipe, method, prompts, list(SEEDS), NUM_CHUNKS).output
        output.frames = as_uint8(output.frames) / np.float32(255)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(vars(output)))
    return TokenTrimPipelineOutput(**pickle.loads(path.read_bytes()))


def save_webp(path: Path, frames: list[np.ndarray], milliseconds: int, quality: int) -> None:
    """An animated WebP of uint8 frames (H, W, 3) that runs in a loop."""
    first, *rest = map(Image.fromarray, frames)
    options = {"duration": milliseconds, "loop": 0, "quality": quality, "method": 4}
    first.save(path, save_all=True, append_images=rest, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/showcase"), help="what is generated, to go on with")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plain-and-held.webp")
    parser.add_argument("--only", choices=METHODS, help="generate this method's videos, and make no picture")
    args = parser.parse_args()
    if args.only:
        generate(args.only, args.work)
        return
    outputs = {method: generate(method, args.work) for method in METHODS}
    plain = outputs["plain"]
    drifts = [end_of(color_drift(as_uint8(video), plain.chunk_frames)) for video in plain.frames]
    typical = np.argsort(drifts)[len(drifts) // 2 - 1 : len(drifts) // 2 + 1]
    comparisons = [Comparison(outputs, video) for video in typical]
    for video, comparison in zip(typical, comparisons):
        print(f"seed {SEEDS[video]}", comparison, sep="\n")


if __name__ == "__main__":
    main()
