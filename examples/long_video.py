# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Ten minutes of the tiny world with two changes of prompt, streamed to disk. Start it again and it resumes.

    python examples/long_video.py --out circle.mp4 --state-dir circle

It writes circle.mp4, which plays while it grows, and circle.jsonl with the decisions, one chunk per line.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "a red circle moving right over a blue background",
    "a red circle moving right over a yellow background",
    "a green square moving left over a white background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("long_video.mp4"))
    parser.add_argument("--state-dir", type=Path, default=Path("long_video"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = DiffusionPipeline.from_pretrained(
        ROOT / "checkpoints" / "tiny-world",
        custom_pipeline=str(ROOT / "pipeline_tokentrim.py"),
        trust_remote_code=True,
    )
    if any(args.state_dir.glob("state-*")):
        stream = pipe.resume(args.state_dir)
    else:
        chunk = pipe.config.num_frames_per_chunk  # in this world, a latent frame is one frame
        num_chunks = max(round(args.minutes * 60 * pipe.fps / chunk), len(PROMPTS))
        changes = [third * num_chunks // len(PROMPTS) for third in range(len(PROMPTS))]
        stream = pipe.stream(
            prompt_schedule=dict(zip(changes, PROMPTS)),
            prompt_transition="cut",  # this model follows its past: without guidance, only a cut changes much
            num_frames=num_chunks * chunk,
            method="tokentrim_plus",
            generator=torch.Generator().manual_seed(args.seed),
            state_dir=args.state_dir,
            save_every=50,
        )
    with stream:
        stream.save_video(args.out)


if __name__ == "__main__":
    main()
