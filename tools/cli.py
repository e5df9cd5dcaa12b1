# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command `tokentrim`; `commands` has a module for each subcommand.

Results go to stdout, progress to stderr. The exit code is 0, 1 for a failure, which is one sentence on stderr, 2 for
wrong usage, or 130 after Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .commands import app, bundle, compare, convert, doctor, drift, generate, heads, modular, publish


COMMANDS = (generate, compare, drift, convert, doctor, heads, publish, bundle, modular, app)


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in a line, without all that could have been typed."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}. See `{self.prog} --help`.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments, parser = sys.argv[1:] if arguments is None else list(arguments), build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    options.arguments = arguments
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `tokentrim drift videos | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"tokentrim {options.command}: error: {as_sentence(error)}", file=sys.stderr)
        return 1


def as_sentence(error: Exception) -> str:
    """`[Errno 28] No space left on device: 'x.mp4'` is no sentence."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def build_parser() -> Parser:
    parser = Parser(
        prog="tokentrim",
        description="Tools of TokenTrim for Diffusers: long video from causal models that does not fall apart.",
        epilog="`tokentrim COMMAND --help` has the options of a command, and examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
