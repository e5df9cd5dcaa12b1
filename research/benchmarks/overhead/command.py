# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The overhead of rollouts over their forwards.

python -m research.benchmarks.overhead

The floor is the same forwards with the same token counts against a preallocated context: projections, norms, rotary
embedding and attention, nothing else. Contestants take turns chunk by chunk in one process, on the same weights. A ratio
compares one chunk's seconds with those of the same chunk in the same repetition (twelve chunks together if one of them
triggers). The tables print the median of all pairs with its 95% interval of order statistics; the interval alone if it
contains 1; and nothing for fewer than six pairs. On a CPU, ratios use the seconds of this process; clock seconds, printed
beside them, include other work on the machine.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import logging

from .contestants import SIZES, STEPS
from .tables import TABLES, Bench
from .timing import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", choices=TABLES, nargs="+", default=["floor"])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--window", type=int, nargs="+", default=[12, 21])
    parser.add_argument("--chunks", type=int, help="chunks of a run, instead of each table's default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--before", type=Path, help="another checkout of this project, for the table `floor`")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    transformer = size.build(args.device)
    parameters = sum(each.numel() for each in transformer.parameters())
    print(f"{machine(args.device)}, {str(size.dtype)[6:]}")
    print(
        f"{args.size}: {parameters / 1e6:.1f}M parameters, {size.grid[0] * size.grid[1]} tokens a frame, {STEPS} steps"
    )
    bench = Bench(transformer, size, args.device, args.repeats, args.chunks, args.window, args.before)
    for name in args.tables:
        TABLES[name](bench)
