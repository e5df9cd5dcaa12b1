# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim publish`."""

import argparse
import shlex
import sys
from pathlib import Path

from ... import __version__
from ..checkpoints import check_folder
from ..folders import check_new_folder
from . import add_command


def add_parser(commands) -> None:
    details = """\
The model card's snippet pins the revision. Its text about your weights comes from the checkpoint's card. The command uploads
nothing; it prints the commands that do.

examples:
  tokentrim publish you/tokentrim --out hub/tokentrim
  tokentrim publish you/tiny-world --checkpoint checkpoints/tiny-world --out hub/tiny-world"""
    summary = "write a folder for the Hub: the code, or the code and a checkpoint, with a model card"
    parser = add_command(commands, run, "publish", summary, details)
    parser.add_argument("repo_id", metavar="REPO", help="the repository on the Hub, you/name")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write, new or empty")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="published with the code (default: the code alone)")
    parser.add_argument("--license", help="of the weights, as the Hub names it (default: the checkpoint's card)")
    parser.add_argument(
        "--revision", default=f"v{__version__}", help="tag that the snippet pins (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", default="a red fox trots through snow", help="of the snippet (default: %(default)s)"
    )
    parser.add_argument("--validate", action="store_true", help="also ask the Hub whether the card is valid")


def run(options: argparse.Namespace) -> int:
    if not options.prompt.strip():
        options.parser.error(f"--prompt must have a word, but is {options.prompt!r}")
    check_new_folder(options.out)
    if options.checkpoint is not None:
        check_folder(Path(options.checkpoint))
    print(f"writing {options.out} ...", file=sys.stderr, flush=True)
    from ..publish import publish

    out, repo_id, revision = options.out, options.repo_id, options.revision
    card = publish(repo_id, out, options.checkpoint, options.license, revision, options.prompt)
    if options.validate:
        card.validate()
    print(out)
    steps = (
        f"Read {out}/README.md, then:",
        "",
        f"  hf repos create {repo_id}",
        f"  hf upload {repo_id} {shlex.quote(out)} .",
        f"  hf repos tag create {repo_id} {shlex.quote(revision)}",
    )
    print(*steps, sep="\n", file=sys.stderr)
    return 0
