# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim compare`."""

import argparse
import os
import sys
from pathlib import Path

from ..compare.plan import DEFAULTS, NUMBERS, QUICK, QUICK_PROMPTS, read_plan
from ..compare.results import Results
from ..names import LAYOUTS, METHODS
from ..numbers import NUMBERS as OF_CALL
from . import DTYPES, add_command, usage
from .generate import OFFLOADS, read_device


def add_parser(commands) -> None:
    details = f"""\
Each prompt and seed makes one video per method, from the same noise. FOLDER/report.html has a verdict, a table, and the
videos side by side. It opens without a network, and grows while the command runs. FOLDER/methods.jsonl has a line for each
method, to be compared across machines.

Start the same command again after an interruption, or with more methods, prompts or seeds: finished videos are kept, and
only the rest is generated. `torchrun --nproc-per-node N -m tokentrim compare ...` splits the work over N processes.

By default, prompts are those of a shipped world, or twelve that come with the command. --quick compares
{len(DEFAULTS["methods"])} methods on {QUICK_PROMPTS} prompts x {QUICK["seeds"]} seeds of {QUICK["chunks"]} chunks. --plan takes a YAML file; options override it:

  checkpoint: self-forcing-diffusers
  prompts: prompts.txt            # or a list of texts
  methods:                        # names, or arguments of the pipeline's call by name
    plain: {{method: plain}}
    moments: {{method: {{reanchor: {{match: moments}}}}, window_size: 12}}
  layouts: [longlive]             # each with the plain method
  settings: {{height: 240, width: 416}}

examples:
  tokentrim compare checkpoints/travelling-world --quick --out comparison
  tokentrim compare self-forcing-diffusers --prompts prompts.txt --layouts longlive memrope --out comparison
  tokentrim compare --plan plan.yaml --out comparison"""
    summary = "compare methods and layouts on a checkpoint: videos, drift, and a report"
    parser = add_command(commands, run, "compare", summary, details)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="folder or Hub id in Diffusers format")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, or of an earlier comparison")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="YAML of what is compared")
    parser.add_argument("--quick", action="store_true", help="a few short videos, for a first impression")
    add_compared(parser.add_argument_group("what is compared"))
    add_machine(parser.add_argument_group("this machine"))


def add_compared(group: argparse._ArgumentGroup) -> None:
    numbers = {name: number.parse for name, number in NUMBERS.items()}
    group.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line")
    group.add_argument(
        "--methods", nargs="+", metavar="NAME", help=f"of {', '.join(METHODS)} (default: all but paper)"
    )
    group.add_argument("--layouts", nargs="+", metavar="NAME", help=f"of {', '.join(LAYOUTS)}, each with plain")
    group.add_argument(
        "--chunks", type=numbers["chunks"], metavar="N", help=f"of each video (default: {DEFAULTS['chunks']})"
    )
    group.add_argument(
        "--seeds", type=numbers["seeds"], metavar="N", help=f"of each prompt (default: {DEFAULTS['seeds']})"
    )
    group.add_argument("--first-seed", type=numbers["first_seed"], metavar="N", help="(default: 0)")
    group.add_argument(
        "--top",
        type=numbers["top"],
        metavar="SHARE",
        help="measure only this share of the picture, from the top, where the rest is meant to change (default: 1)",
    )
    group.add_argument(
        "--steps",
        type=OF_CALL["num_inference_steps"].parse,
        metavar="N",
        dest="num_inference_steps",
        help="denoising steps of a chunk (default: the checkpoint's)",
    )
    group.add_argument("--height", type=OF_CALL["height"].parse, metavar="N", help="(default: the checkpoint's)")
    group.add_argument("--width", type=OF_CALL["width"].parse, metavar="N", help="(default: the checkpoint's)")
    group.add_argument(
        "--guidance-scale", type=OF_CALL["guidance_scale"].parse, metavar="X", help="guidance above 1 (default: 1)"
    )


def add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch",
        type=NUMBERS["batch"].parse,
        metavar="N",
        help="videos at once (default: what memory allows, up to 8)",
    )
    group.add_argument(
        "--device", type=read_device, help="cpu, cuda, cuda:1, mps (default: an accelerator, or the CPU)"
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on a CPU, else bfloat16)")
    group.add_argument("--offload", choices=OFFLOADS, default="none", help="as in `tokentrim generate`")
    group.add_argument("--trust-remote-code", action="store_true", help="run code in the checkpoint")


def run(options: argparse.Namespace) -> int:
    with usage(options):
        plan = read_plan(options)
    results = Results(options.out)
    results.check()
    is_first = os.environ.get("RANK", "0") == "0"  # of the launcher's processes
    num_videos = len(plan.methods) * len(plan.prompts) * plan.seeds
    told = f"{len(plan.methods)} methods x {len(plan.prompts)} prompts x {plan.seeds} seeds"
    if is_first:
        print(f"{options.out}: {num_videos} videos of {plan.chunks} chunks ({told})", file=sys.stderr, flush=True)
    from ..compare.making import Maker, print_progress, tell_time

    try:
        with results.owned(is_first):
            maker = Maker(plan, results, options.dtype, options.device, options.offload, options.trust_remote_code)
            todo = maker.missing()
            if todo and is_first:
                time = tell_time(maker.probe(todo))
                told = f"{sum(map(len, todo))} videos to make in batches of up to {maker.plan.batch}, {time}"
                print(f"{told}; {options.out}/report.html grows meanwhile", file=sys.stderr, flush=True)
            maker.make(print_progress)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished videos are kept; start the same command again to continue.", file=sys.stderr)
        raise
    if is_first:
        print(maker.summary())
        print(results.out / "report.html")
    return 0
