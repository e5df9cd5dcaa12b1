# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim modular`."""

import argparse
import sys
from pathlib import Path

from ..checkpoints import find_checkpoint
from ..folders import check_new_folder
from . import add_command


def add_parser(commands) -> None:
    details = """\
The folder holds the code as one file, block.py, the settings of the rollout and the schedule. Weights stay where they are.

    pipe = ModularPipeline.from_pretrained("OUT", trust_remote_code=True)
    pipe.load_components()
    videos = pipe(prompt="a red fox trots through snow", num_frames=81, output="videos")

example:
  tokentrim modular fox-blocks --checkpoint self-forcing-diffusers"""
    summary = "write a checkpoint's rollout as a block of Modular Diffusers"
    parser = add_command(commands, run, "modular", summary, details)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write, new or empty")
    parser.add_argument("--checkpoint", required=True, help="a folder or a Hub id, in Diffusers format")


def run(options: argparse.Namespace) -> int:
    check_new_folder(options.out)
    find_checkpoint(options.checkpoint)
    print(f"writing {options.out} ...", file=sys.stderr, flush=True)
    from ..modular import write_modular

    write_modular(options.out, options.checkpoint)
    print(options.out)
    return 0
