# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim doctor`."""

import argparse
import sys
from pathlib import Path

from ..checkpoints import check_code, check_folder, check_size
from ..numbers import NUMBERS
from . import DTYPES, add_command


def add_parser(commands) -> None:
    details = """\
Eleven lines: the folder, its parts, rollout, context, size and its memory, schedule and license, whether numbers are finite, what the order of
frames means to the model, memory and speed on this machine, and anything odd. The exit code is 1 if anything is odd.

The test of the order of frames is a heuristic. It measures the remaining error of a noised chunk beside its clean past, and
beside its clean future. A model trained chunk by chunk reads the past and has never seen a future. A bidirectional model
has never seen a clean neighbor of a noised chunk, or uses both.

examples:
  tokentrim doctor self-forcing-diffusers
  tokentrim doctor self-forcing-diffusers --height 240 --width 416 --prompt "a red fox trots through snow\""""
    summary = "report what a checkpoint is, whether it runs, and anything odd"
    parser = add_command(commands, run, "doctor", summary, details)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder in Diffusers format")
    parser.add_argument("--prompt", default="a red fox trots through snow", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on a CPU, else bfloat16)")
    parser.add_argument(
        "--height", type=NUMBERS["height"].parse, metavar="N", help="in pixels (default: the checkpoint's, or 480)"
    )
    parser.add_argument(
        "--width", type=NUMBERS["width"].parse, metavar="N", help="in pixels (default: the checkpoint's, or 832)"
    )


def run(options: argparse.Namespace) -> int:
    if not options.prompt.strip():
        options.parser.error(f"--prompt must have a word, but is {options.prompt!r}")
    check_folder(options.checkpoint)
    check_code(options.checkpoint, trust_remote_code=False)
    if (options.checkpoint / "transformer").is_dir():
        check_size(options.checkpoint, {"height": options.height, "width": options.width})
    print(f"reading {options.checkpoint}, making two chunks ...", file=sys.stderr, flush=True)
    import torch

    from ..doctor import examine, format_report

    dtype = getattr(torch, options.dtype) if options.dtype else None
    found, odd = examine(options.checkpoint, options.prompt, dtype, options.height, options.width)
    print(format_report(found, odd))
    return int(bool(odd))
