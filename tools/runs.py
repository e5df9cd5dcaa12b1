# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The options of `tokentrim generate` that a run began with, kept beside its states; without PyTorch."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


RUN = "command.json"  # in a state folder
DEFAULTS = {"config": [], "save_every": 10, "seed": 0, "fps": 16.0, "dtype": "float32"}
PATHS = ("prompts", "out", "config", "prompt_schedule")


def complete_run(options: argparse.Namespace) -> argparse.Namespace:
    """The options with defaults; of a run that is resumed, those that it began with."""
    options, error = argparse.Namespace(**vars(options)), options.parser.error
    if options.resume and options.state_dir is None:
        error("--resume needs --state-dir")
    for name in ("state_dir", *PATHS):
        value = getattr(options, name)
        value = [path.absolute() for path in value] if isinstance(value, list) else value and value.absolute()
        setattr(options, name, value)
    if options.checkpoint is not None and Path(options.checkpoint).exists():
        options.checkpoint = str(Path(options.checkpoint).absolute())
    if options.resume:
        begun = read_run(options.state_dir / RUN)
        for name, value in as_plain(options).items():
            if value not in (None, begun.setdefault(name)):
                error(f"--{name.replace('_', '-')}: the run began with {begun[name]!r}, not {value!r}")
        for name in PATHS:
            paths = begun[name]
            begun[name] = list(map(Path, paths)) if isinstance(paths, list) else paths and Path(paths)
        vars(options).update(begun)
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.prompt is None and options.prompts is None:
        error("one of the arguments PROMPT --prompts is required")
    missing = [f"--{name}" for name in ("out", "checkpoint") if getattr(options, name) is None]
    if missing:
        error(f"the following arguments are required: {', '.join(missing)}")
    return options


def read_run(path: Path) -> dict:
    try:
        return {**json.loads(path.read_text())}
    except (TypeError, ValueError) as error:
        raise ValueError(f"--state-dir: {path} is damaged: {error}") from error


def as_plain(options: argparse.Namespace) -> dict:
    """What makes a run, as JSON has it."""
    left_out = ("run", "parser", "command", "state_dir", "resume", "arguments")
    plain = {name: value for name, value in vars(options).items() if name not in left_out}
    for name in PATHS:
        value = plain[name]
        plain[name] = list(map(str, value)) if isinstance(value, list) else value and str(value)
    return plain


def save_run(options: argparse.Namespace, state_dirs: Sequence[Path]) -> None:
    """Beside the states, what they were made with."""
    from ..tokentrim_files.run_state import has_state

    if any(has_state(folder) for folder in state_dirs):
        raise ValueError(f"--state-dir: {options.state_dir} has a run: add --resume to go on, or name another folder")
    options.state_dir.mkdir(parents=True, exist_ok=True)
    path = options.state_dir / RUN
    unfinished = path.with_suffix(f".{os.getpid()}")  # of one of several processes
    unfinished.write_text(json.dumps(as_plain(options), indent=1))
    os.replace(unfinished, path)


def how_to_go_on(options: argparse.Namespace) -> str:
    """After Ctrl-C, in words and as a command."""
    program = "python -m tokentrim" if Path(sys.argv[0]).name == "__main__.py" else "tokentrim"
    if options.state_dir is not None:
        return f"To go on:\n  {program} generate --state-dir {shlex.quote(str(options.state_dir))} --resume"
    begin = f"  {program} {shlex.join(options.arguments)}"
    if options.prompts is not None:
        return f"To make those that are missing:\n{begin}"
    growing = options.out.with_name(f"{options.out.stem}.growing.mp4")
    return f"{growing} has what was made. To begin anew, so that it can go on after an interruption:\n{begin} --state-dir DIR"
