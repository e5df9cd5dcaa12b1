# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`make demo`: one prompt and one noise, rolled out plain, with TokenTrim as in the paper, and with `tokentrim_plus`."""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from tokentrim import Comparison, TokenTrimPipelineOutput

from .rollouts import CHECKPOINT, METHODS, PROMPTS, STAYS, load_pipeline, run_method


def roll_out(method: str, place: int, args: argparse.Namespace) -> TokenTrimPipelineOutput:
    """The video of one method, in a process of its own."""
    torch.set_num_threads(1)  # the models are tiny: threads would wait for each other
    pipe = load_pipeline(CHECKPOINT.parent / args.world)
    pipe.set_progress_bar_config(desc=f"{method:14}", position=place, mininterval=1)
    return run_method(pipe, method, [args.prompt], [args.seed], args.chunks).output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=PROMPTS, default="travelling-world", help="a folder of checkpoints/")
    parser.add_argument("--prompt", help="by default an example of the world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args()
    args.prompt = args.prompt or PROMPTS[args.world]
    args.out.mkdir(parents=True, exist_ok=True)

    with ProcessPoolExecutor(len(METHODS), multiprocessing.get_context("spawn")) as pool:
        outputs = list(pool.map(roll_out, METHODS, range(len(METHODS)), [args] * len(METHODS)))
    comparison = Comparison(dict(zip(METHODS, outputs)), top=STAYS[args.world])

    for method, output in zip(METHODS, outputs):
        Comparison({method: output}).save_video(args.out / f"{method}.mp4")
    comparison.save_video(args.out / "side_by_side.mp4")
    comparison.save_webp(args.out / "side_by_side.webp")
    Image.fromarray(comparison.filmstrip()).save(args.out / "filmstrip.png")
    comparison.plot_drift().savefig(args.out / "drift.png", dpi=110)
    (args.out / "decisions.json").write_text(json.dumps(comparison.decisions, indent=1))

    seconds = sum(comparison.chunk_frames) / comparison.fps
    print(f"\n{args.prompt!r}, seed {args.seed}: {args.chunks} chunks ({seconds:.1f} s)\n{comparison}")
    print(f"written to {args.out}/: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    main()
