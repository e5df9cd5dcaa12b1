# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Cost of re-anchoring and quarantine: their share of a rollout's seconds, and their seconds at the size of Wan 1.3B.

python -m research.benchmarks.commit
"""

import argparse
import statistics
import time

import torch

from research.evaluation.experiment import sample_prompts
from research.evaluation.rollouts import load_pipeline
from tokentrim import Quarantine, Reanchor


WAN = (16, 3, 60, 104)  # a chunk of latents at 480 x 832


class Timed:
    """Adds up the seconds that all copies of a policy take to commit."""

    seconds: list[float] = []

    def commit(self, chunk: torch.Tensor) -> torch.Tensor | None:
        start = time.perf_counter()
        try:
            return super().commit(chunk)
        finally:
            self.seconds.append(time.perf_counter() - start)


class TimedQuarantine(Timed, Quarantine):
    pass


class TimedReanchor(Timed, Reanchor):
    pass


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
        Timed.seconds.clear()
        start = time.perf_counter()
        method = [TimedQuarantine(), TimedReanchor()]
        pipe(prompts, num_frames=3 * args.chunks, output_type="latent", method=method)
        shares.append(sum(Timed.seconds) / (time.perf_counter() - start))
    print(f"share of a rollout of {args.videos} videos, {args.chunks} chunks: median {statistics.median(shares):.2%}")

    policies, seconds = [Quarantine(), Reanchor()], []
    for index in range(args.repeats + 1):
        chunk = torch.randn(WAN, generator=torch.Generator().manual_seed(index))
        start = time.perf_counter()
        for policy in policies:
            policy.commit(chunk)
        seconds.append(time.perf_counter() - start)
    print(f"a chunk of latents {WAN}: median {statistics.median(seconds[1:]):.3f} s on this CPU")


if __name__ == "__main__":
    main()
