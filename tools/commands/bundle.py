# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim bundle`."""

import argparse
from pathlib import Path

from . import add_command


def add_parser(commands) -> None:
    details = "example:\n  tokentrim bundle build/tokentrim.py"
    summary = "write the pipeline and its modules as one file, for `examples/community` of Diffusers"
    parser = add_command(commands, run, "bundle", summary, details)
    parser.add_argument("out", metavar="FILE", type=Path, help="the .py file to write: new, or an earlier bundle")


def run(options: argparse.Namespace) -> int:
    if options.out.suffix != ".py":
        options.parser.error(f"FILE must end with .py, but is {str(options.out)!r}")
    from ..bundle import write_bundle

    write_bundle(options.out)
    print(options.out)
    return 0
