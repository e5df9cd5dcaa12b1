# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim generate`."""

import argparse
import json
import os
import sys
from pathlib import Path

from ..runs import complete_run, how_to_go_on, save_run
from . import DTYPES, add_command


TRANSITIONS = ("keep", "recache", "flush", "cut")


def add_parser(commands) -> None:
    details = """\
A video grows as NAME.growing.mp4, which plays up to its last chunk whenever the process dies, with the decision of each
chunk on a line of NAME.growing.jsonl. When it is complete and verified, both lose the `.growing`; NAME.json holds the
prompt, the seed, the arguments and a fingerprint of the checkpoint.

Line n of the prompts, from 0, makes FOLDER/n-its-words.mp4 with the seed --seed + n. What is there already is skipped:
start again after an interruption. A video that is there, but is not the one that is asked for, is an error. A prompt that
fails is reported at the end, and the rest goes on. `accelerate launch` and `torchrun` split the prompts over processes;
so do commands that are started side by side.

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
    if text == "endless":
        return 0
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of frames, 0 or `endless`, but is {text!r}")
    return int(text)


def read_name(text: str) -> str | dict | list:
    """A name, or JSON."""
    try:
        return json.loads(text) if text[:1] in ("{", "[") else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a name or JSON, but is {text!r}: {error}") from error


def run(options: argparse.Namespace) -> int:
    if options.prompt is not None and options.out is not None and options.out.suffix != ".mp4":
        options.parser.error(f"--out must end with .mp4 for one prompt, but is {str(options.out)!r}")
    if options.prompts is not None and options.out is not None and options.out.suffix == ".mp4":
        options.parser.error(f"--out must be a folder for --prompts, but is {str(options.out)!r}")
    options = complete_run(options)
    from ...tokentrim_checks import check_int
    from ...tokentrim_frames.mp4 import check_fps
    from ...tokentrim_policies.registry import METHODS
    from ..generate import generate_missing
    from ..jobs import Job, check_settings, read_jobs, read_schedule, read_settings

    try:
        check_fps(options.fps)
        check_int("save_every", options.save_every, 1)
    except ValueError as error:
        options.parser.error(str(error))
    if isinstance(options.method, str) and options.method not in METHODS:
        options.parser.error(f"--method must be one of {', '.join(METHODS)}, but is {options.method!r}")
    settings = read_settings(options.config)
    for name in ("method", "layout", "prompt_transition", "blend_chunks"):
        if (value := getattr(options, name)) is not None:
            settings[name] = value
    if options.num_frames is not None:
        settings["num_frames"] = options.num_frames or None
    if options.prompt_schedule is not None:
        settings["prompt_schedule"] = read_schedule(options.prompt_schedule)
    try:
        check_settings(settings)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if options.prompts is None:
        jobs = [Job(options.prompt, options.seed, options.out, settings, options.state_dir)]
    else:
        jobs, note = read_jobs(options.prompts, options.out, options.seed, settings, options.state_dir)
        if note is not None and os.environ.get("RANK", "0") == "0":  # of the launcher's processes
            print(note, file=sys.stderr)
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
