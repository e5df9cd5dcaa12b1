# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim app`: starts the page of `space/` as a Space does."""

import argparse
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from ..checkpoints import find_checkpoint
from ..numbers import PORT
from . import add_command


SPACE = Path(__file__).parent.parent.parent / "space"


def add_parser(commands) -> None:
    details = """\
It serves this machine alone, until Ctrl-C, and nothing leaves it. docs/app.md describes the page.

examples:
  tokentrim app
  tokentrim app --checkpoint self-forcing-diffusers --port 8000"""
    summary = "a page where a plain rollout drifts beside one that is held, while both are made"
    parser = add_command(commands, run, "app", summary, details)
    parser.add_argument("--checkpoint", help="folder or Hub id (default: the tiny world, in a clone of this project)")
    parser.add_argument(
        "--port", type=PORT.parse, default=7860, metavar="N", help="of the loopback (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('gradio is not installed: `make app` in a clone, or `pip install ".[app]"`.')
    os.environ["GRADIO_SERVER_PORT"] = str(options.port)
    if options.checkpoint is not None:
        find_checkpoint(options.checkpoint)
        os.environ["TOKENTRIM_CHECKPOINT"] = options.checkpoint
    sys.path.insert(0, str(SPACE))  # where `app.py` finds the modules beside it
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    return 0
