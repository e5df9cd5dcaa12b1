# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim generate`."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import DTYPES, add_command


TRANSITIONS = ("keep", "recache", "flush", "cut")
RUN = "command.json"  # in a state folder: the options that the run began with


def add_parser(commands) -> None:
    details = """\
A video grows as NAME.growing.mp4, which plays up to its last chunk whenever the process dies, with the decision of each
chunk on a line of NAME.growing.jsonl. When it is complete and verified, both lose the `.growing`; NAME.json holds the
prompt, the seed and the arguments.

Line n of the prompts, from 0, makes FOLDER/n-its-words.mp4 with the seed --seed + n. What is there already is skipped:
start again after an interruption. A prompt that fails is reported at the end, and the rest goes on. `accelerate launch`
and `torchrun` split the prompts over processes.

With --state-dir a run goes on where it was last saved, to the same file as if nothing had happened. What the options
were is saved with it: --resume needs --state-dir alone.

examples:
  tokentrim generate "a red fox trots through snow" --checkpoint self-forcing-diffusers --out fox.mp4
  tokentrim generate "a red fox" --checkpoint self-forcing-diffusers --out fox.mp4 --num-frames endless --state-dir run
  tokentrim generate --state-dir run --resume
  tokentrim generate --prompts prompts.txt --checkpoint self-forcing-diffusers --method tokentrim_plus --out videos
  accelerate launch -m tokentrim generate --prompts prompts.txt --checkpoint self-forcing-diffusers --out videos"""
    parser = add_command(commands, run, "generate", "videos of one prompt, or of a file of prompts", details)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("prompt", metavar="PROMPT", nargs="?", help="one prompt")
    given.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line")
    parser.add_argument("--out", type=Path, help="an .mp4 file, or a folder with --prompts")
    parser.add_argument("--checkpoint", help="folder or Hub id of a causal model in Diffusers format")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help="JSON of arguments of the call; may be repeated, the later file counts, and options before all",
    )
    parser.add_argument(
        "--num-frames",
        type=read_num_frames,
        metavar="N",
        help="frames of each video; 0 or `endless`: until Ctrl-C (default: the config's, or 81)",
    )
    parser.add_argument(
        "--method",
        type=read_name,
        help="plain, tokentrim, tokentrim_plus or paper; or JSON of policies with settings (default: the config's, or tokentrim)",
    )
    parser.add_argument("--layout", type=read_name, help="what is read of the past: a name, or JSON with settings")
    parser.add_argument(
        "--prompt-schedule", type=Path, metavar="FILE", help='JSON of prompts over time, {"20": "a green circle"}'
    )
    parser.add_argument("--prompt-transition", choices=TRANSITIONS, help="what becomes of the context at a change")
    parser.add_argument("--blend-chunks", type=int, metavar="N", help="chunks over which one prompt becomes the next")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where the run is saved (with --prompts: runs)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --state-dir")
    parser.add_argument("--save-every", type=int, metavar="N", help="chunks between two states (default: 10)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the first prompt (default: 0)")
    parser.add_argument("--fps", type=float, metavar="N", help="frames per second (default: 16)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32)")


def read_num_frames(text: str) -> int:
    """0 for a video without an end."""
    number = 0 if text == "endless" else int(text)
    if number < 0:
        raise ValueError
    return number


def read_name(text: str) -> str | dict | list:
    """A name, or JSON."""
    return json.loads(text) if text[:1] in ("{", "[") else text


def run(options: argparse.Namespace) -> int:
    if options.prompt is not None and options.out is not None and options.out.suffix != ".mp4":
        options.parser.error(f"--out has to end with .mp4 for one prompt, but is {str(options.out)!r}")
    options = complete_run(options)
    from ...tokentrim_methods import METHODS
    from ..generate import Job, generate_missing, read_jobs, read_schedule, read_settings

    if isinstance(options.method, str) and options.method not in METHODS:
        options.parser.error(f"--method has to be one of {', '.join(METHODS)}, but is {options.method!r}")
    settings = read_settings(options.config)
    for name in ("method", "layout", "prompt_transition", "blend_chunks"):
        if (value := getattr(options, name)) is not None:
            settings[name] = value
    if options.num_frames is not None:
        settings["num_frames"] = options.num_frames or None
    if options.prompt_schedule is not None:
        settings["prompt_schedule"] = read_schedule(options.prompt_schedule)
    if options.prompts is None:
        jobs = [Job(options.prompt, options.seed, options.out, settings, options.state_dir)]
    else:
        jobs = read_jobs(options.prompts, options.out, options.seed, settings, options.state_dir)
    if options.state_dir is not None and not options.resume:
        save_run(options, [job.state_dir for job in jobs])
    try:
        failed = generate_missing(
            jobs, options.checkpoint, options.dtype, options.fps, options.save_every, options.resume
        )
    except KeyboardInterrupt:
        print(f"\nInterrupted. {how_to_go_on(options)}", file=sys.stderr)
        raise
    return int(failed > 0)


# What a run began with; with --resume it is read from the state folder.
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
        begun = json.loads((options.state_dir / RUN).read_text())
        for name, value in as_plain(options).items():
            if value not in (None, begun[name]):
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
    from ...tokentrim_state import has_state

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
