# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What re-anchoring and quarantine cost: their share of a rollout's seconds, and their seconds at the size of Wan 1.3B.

python -m benchmarks.commit
"""

import argparse
import json
import statistics
import time
from unittest.mock import patch

import torch

from evaluation.experiment import sample_prompts
from evaluation.rollouts import ROOT, load_pipeline
from tokentrim.tokentrim_anchor import Anchor
from tokentrim.tokentrim_quarantine import Quarantine


PLUS = json.loads((ROOT / "configs" / "tokentrim_plus.json").read_text())
WAN = (1, 16, 3, 60, 104)  # a chunk of latents at 480 x 832


def timed(method, seconds: list[float]):
    """`method`, adding up what it takes."""

    def call(*args):
        start = time.perf_counter()
        result = method(*args)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts, shares = sample_prompts(list(range(args.videos))), []
    for _ in range(args.repeats):
        ours = []
        with (
            patch.object(Anchor, "hold", timed(Anchor.hold, ours)),
            patch.object(Quarantine, "judge", timed(Quarantine.judge, ours)),
        ):
            start = time.perf_counter()
            pipe(prompts, num_frames=3 * args.chunks, output_type="latent", **PLUS)
            shares.append(sum(ours) / (time.perf_counter() - start))
    print(f"share of a rollout of {args.videos} videos, {args.chunks} chunks: median {statistics.median(shares):.2%}")

    anchor, quarantine, seconds = Anchor(PLUS["reanchor"]), Quarantine(1, PLUS["quarantine_sensitivity"]), []
    for index in range(args.repeats + 1):
        chunk = torch.randn(WAN, generator=torch.Generator().manual_seed(index))
        start = time.perf_counter()
        quarantine.judge(chunk)
        anchor.hold(chunk)
        seconds.append(time.perf_counter() - start)
    print(f"a chunk of latents {WAN}: median {statistics.median(seconds[1:]):.3f} s on this CPU")


if __name__ == "__main__":
    main()
