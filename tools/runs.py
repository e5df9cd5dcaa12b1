# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The options of `tokentrim generate` that a run began with, kept beside its states; without PyTorch."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from ..tokentrim_writing import locked, write_whole


RUN = "command.json"  # in a state folder
DEFAULTS = {"config": [], "save_every": 10, "seed": 0, "offload": "none"}
PATHS = ("prompts", "out", "config", "prompt_schedule", "image", "video")
NOT_KEPT = (
    "run",
    "parser",
    "command",
    "state_dir",
    "resume",
    "arguments",
    "trust_remote_code",
)  # trust is never taken over
LISTS, ANY = ("config",), ("method", "layout")
NUMBERS = (
    "num_frames seed save_every blend_chunks fps num_inference_steps height width guidance_scale num_videos_per_prompt"
).split()


def complete_run(options: argparse.Namespace) -> argparse.Namespace:
    """Complete the options with defaults, or with those of the run that is resumed."""
    options, error = argparse.Namespace(**vars(options)), options.parser.error
    if options.resume and options.state_dir is None:
        error("--resume needs --state-dir")
    for name in ("state_dir", *PATHS):
        value = getattr(options, name)
        value = [path.absolute() for path in value] if isinstance(value, list) else value and value.absolute()
        setattr(options, name, value)
    if options.out is not None and options.out.is_symlink():
        options.out = Path(os.path.realpath(options.out))  # a link counts as its target
    if options.checkpoint is not None and Path(options.checkpoint).expanduser().exists():
        options.checkpoint = str(Path(options.checkpoint).expanduser().absolute())
    if options.resume:
        begun, asked = read_run(options.state_dir), as_plain(options)
        for name, value in asked.items():
            if value is not None and value != begun.get(name):
                error(f"--{name.replace('_', '-')}: the run began with {begun.get(name)!r}, not {value!r}")
        for name in asked:
            value = begun.get(name)
            if name in PATHS:
                value = list(map(Path, value)) if isinstance(value, list) else value and Path(value)
            setattr(options, name, value)
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.prompt is None and options.prompts is None:
        error("a PROMPT or --prompts is required")
    missing = [f"--{name}" for name in ("out", "checkpoint") if getattr(options, name) is None]
    if missing:
        error(f"the following arguments are required: {', '.join(missing)}")
    return options


def read_run(state_dir: Path) -> dict[str, Any]:
    """
    The options that a run began with.

    Raises:
        `ValueError`: there is no such run, or the file is not one that this command wrote.
    """
    path = state_dir / RUN
    if not path.is_file():
        problem = f"has no {RUN}" if state_dir.is_dir() else "does not exist"
        raise ValueError(f"--state-dir must be the folder of a run to resume, but {state_dir} {problem}.")
    try:
        begun = {**json.loads(path.read_text())}
    except (TypeError, ValueError) as error:
        raise ValueError(f"--state-dir: {path} is damaged: {error}") from error
    for name, value in begun.items():
        if name in LISTS:
            fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
        elif name in NUMBERS:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            fits = isinstance(value, (str, dict, list) if name in ANY else str)
        if value is not None and not fits:
            raise ValueError(f"--state-dir: {path} is damaged: {name} is {value!r:.60}")
    return begun


def as_plain(options: argparse.Namespace) -> dict[str, Any]:
    """The inputs of a run, as plain JSON."""
    plain = {name: value for name, value in vars(options).items() if name not in NOT_KEPT}
    for name in PATHS:
        value = plain[name]
        plain[name] = list(map(str, value)) if isinstance(value, list) else value and str(value)
    return plain


@contextmanager
def own_run(state_dir: Path | None) -> Iterator[None]:
    """
    Keep other commands from a state folder.

    Raises:
        `OSError`: another command uses it.
    """
    if state_dir is None:
        yield
        return
    state_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(state_dir / RUN):
            yield
    except Timeout as error:
        told = f"--state-dir: {state_dir} is in use by another `tokentrim generate`; each command needs its own."
        raise OSError(told) from error


def save_run(options: argparse.Namespace, state_dirs: list[Path]) -> None:
    """Write the options beside the states."""
    path = options.state_dir / RUN
    if any(path.is_dir() for folder in state_dirs for path in folder.glob("state-*")):
        raise ValueError(
            f"--state-dir: {options.state_dir} has a run: add --resume to continue, or name another folder"
        )
    if path.exists():
        read_run(options.state_dir)  # ours, from a finished run
    write_whole(path, json.dumps(as_plain(options), indent=1))


def how_to_go_on(options: argparse.Namespace) -> str:
    """What to do after Ctrl-C, in words and as a command."""
    program = "python -m tokentrim" if Path(sys.argv[0]).name == "__main__.py" else "tokentrim"
    if options.state_dir is not None:
        return f"To continue:\n  {program} generate --state-dir {shlex.quote(str(options.state_dir))} --resume"
    begin = f"  {program} {shlex.join(options.arguments)}"
    if options.prompts is not None:
        return f"To make the missing videos:\n{begin}"
    growing = options.out.with_name(f"{options.out.stem}.growing.mp4")
    told = f"{growing} has the finished chunks." if growing.exists() else "No chunk was finished."
    return f"{told} To start again, with a state that can resume:\n{begin} --state-dir DIR"
