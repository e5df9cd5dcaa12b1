# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A module for each subcommand: `add_parser(commands)` says what a user types, `run(options)` does it.

What a tool needs is imported when it runs, so that help and usage errors need no PyTorch.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager


DTYPES = ("float32", "bfloat16", "float16")


def add_command(commands, run: Callable, name: str, summary: str, details: str) -> argparse.ArgumentParser:
    """A subcommand whose options `run` takes; `details` ends with examples."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


@contextmanager
def usage(options: argparse.Namespace) -> Iterator[None]:
    """What is wrong with options by themselves is wrong usage: one line, and exit code 2."""
    try:
        yield
    except (TypeError, ValueError) as error:
        options.parser.error(str(error))
