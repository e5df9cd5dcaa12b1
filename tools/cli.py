# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command `tokentrim`: what a user types, for every subcommand.

Each tool is imported when it runs, so that help and usage errors need no PyTorch. Results go to stdout, progress to
stderr. The exit code is 0, 1 for a failure, which is one sentence on stderr, 2 for wrong usage, or 130 after Ctrl-C.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from .presets import PRESETS
from .runs import complete_run, how_to_go_on, save_run


DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser().parse_args(arguments)
    options.arguments = arguments
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `tokentrim drift videos | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"tokentrim {options.command}: error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokentrim",
        description="Tools of TokenTrim for Diffusers: long video from causal models that does not fall apart.",
        epilog="`tokentrim COMMAND --help` has the options of a command, and examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    add_generate(commands)
    add_convert(commands)
    add_publish(commands)
    add_bundle(commands)
    add_drift(commands)
    return parser


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


# generate


TRANSITIONS = ("keep", "recache", "flush", "cut")


def add_generate(commands) -> None:
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
    parser = add_command(commands, run_generate, "generate", "videos of one prompt, or of a file of prompts", details)
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
        raise argparse.ArgumentTypeError(f"has to be a number of frames, 0 or `endless`, but is {text!r}")
    return int(text)


def read_name(text: str) -> str | dict | list:
    """A name, or JSON."""
    try:
        return json.loads(text) if text[:1] in ("{", "[") else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"has to be a name or JSON, but is {text!r}: {error}") from error


def run_generate(options: argparse.Namespace) -> int:
    if options.prompt is not None and options.out is not None and options.out.suffix != ".mp4":
        options.parser.error(f"--out has to end with .mp4 for one prompt, but is {str(options.out)!r}")
    if options.prompts is not None and options.out is not None and options.out.suffix == ".mp4":
        options.parser.error(f"--out has to be a folder for --prompts, but is {str(options.out)!r}")
    options = complete_run(options)
    from ..tokentrim_checks import check_int
    from ..tokentrim_methods import METHODS
    from ..tokentrim_video import check_fps
    from .generate import generate_missing
    from .jobs import Job, check_settings, read_jobs, read_schedule, read_settings

    try:
        check_fps(options.fps)
        check_int("save_every", options.save_every, 1)
    except ValueError as error:
        options.parser.error(str(error))
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


# convert


def add_convert(commands) -> None:
    details = """\
The folder that it writes says how its model is rolled out: `from_pretrained` and a prompt are enough. Conversion fails
if a tensor is left over or missing, and a failure leaves nothing behind. Only tensors are unpickled. Weights are read,
merged and written one by one: memory is needed for a few of them.

examples:
  tokentrim convert self_forcing_dmd.pt --check
  tokentrim convert self_forcing_dmd.pt --preset self_forcing --base Wan2.1-T2V-1.3B-Diffusers \\
      --out self-forcing-diffusers
  tokentrim convert longlive_base.pt --lora lora.pt --preset longlive --base Wan2.1-T2V-1.3B-Diffusers \\
      --out longlive-diffusers"""
    summary = "original files of Self Forcing, Rolling Forcing and others to Diffusers folders"
    parser = add_command(commands, run_convert, "convert", summary, details)
    layouts = "{'generator': ..., 'generator_ema': ...}, {'model': ...} or a bare state dict"
    parser.add_argument(
        "path",
        metavar="FILE",
        type=Path,
        help=f".pt or .safetensors, laid out as {layouts}; or the folder or index of sharded safetensors",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="Wan2.1 text-to-video folder in Diffusers format, for tokenizer, text encoder and VAE",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the folder to write, new or empty")
    parser.add_argument("--preset", choices=PRESETS, help="what the model was trained for")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="LoRA of LongLive, peft or Diffusers to merge")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="moving average of the weights (default: if the file has it)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer (default: as in the file)")
    parser.add_argument(
        "--check", action="store_true", help="say what is in FILE and whether it fits; only headers are read"
    )


def run_convert(options: argparse.Namespace) -> int:
    if options.check:
        from .dry_run import describe_conversion

        print(describe_conversion(options.path, options.ema, options.lora, options.base, options.preset))
        return 0
    lacks = [f"--{name}" for name in ("base", "out", "preset") if getattr(options, name) is None]
    if lacks:
        options.parser.error(f"the following arguments are required: {', '.join(lacks)}")
    import torch

    from .convert import convert_checkpoint, logger

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    convert_checkpoint(options.path, options.base, options.out, options.preset, options.ema, dtype, options.lora)
    print(options.out)
    return 0


# publish


def add_publish(commands) -> None:
    details = """\
The model card's snippet pins the revision; its text about your weights is that of the checkpoint's own card. Nothing is
uploaded: the commands that do so are printed.

examples:
  tokentrim publish you/tokentrim --out hub/tokentrim
  tokentrim publish you/tiny-world --checkpoint checkpoints/tiny-world --out hub/tiny-world"""
    summary = "a folder that is ready for the Hub: the code, or the code and a checkpoint, with a model card"
    parser = add_command(commands, run_publish, "publish", summary, details)
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


def run_publish(options: argparse.Namespace) -> int:
    from .publish import publish

    out, repo_id, revision = options.out, options.repo_id, options.revision
    card = publish(repo_id, out, options.checkpoint, options.license, revision, options.prompt)
    if options.validate:
        card.validate()
    print(f"written {out}. Read its README.md, then:\n\n  hf repos create {repo_id}\n  hf upload {repo_id} {out} .")
    print(f"  hf repos tag create {repo_id} {revision}")
    return 0


# bundle


def add_bundle(commands) -> None:
    details = "example:\n  tokentrim bundle build/tokentrim.py"
    summary = "the pipeline and its companions as one file, for `examples/community` of Diffusers"
    parser = add_command(commands, run_bundle, "bundle", summary, details)
    parser.add_argument("out", metavar="FILE", type=Path, help="the .py file to write, new or an earlier one")


def run_bundle(options: argparse.Namespace) -> int:
    if options.out.suffix != ".py":
        options.parser.error(f"FILE has to end with .py, but is {str(options.out)!r}")
    from .bundle import write_bundle

    write_bundle(options.out)
    print(options.out)
    return 0


# drift


def add_drift(commands) -> None:
    details = """\
Everything is measured from the frames alone, without a model: colour similarity of end and start, slopes of brightness,
contrast, saturation and sharpness, start-end contrast, VDE, late / early motion, the worst twentieth, and whether the
videos of a folder grow alike. docs/drift.md says what each number means and what it cannot tell.

examples:
  tokentrim drift fox.mp4
  tokentrim drift videos/plain videos/tokentrim_plus --plot drift.png --csv drift.csv"""
    summary = "how much videos of any model drift, as tables and a figure"
    parser = add_command(commands, run_drift, "drift", summary, details)
    parser.add_argument(
        "videos",
        type=Path,
        nargs="+",
        metavar="VIDEO",
        help="mp4, gif, webm, mov, mkv or avi; a folder of pictures, which is one video; or a folder of videos",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="figure to write: .png, .pdf or .svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all measures, and their values over time")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="all measures, a row for each video")


def run_drift(options: argparse.Namespace) -> int:
    if options.plot is not None and options.plot.suffix not in (".png", ".pdf", ".svg"):
        options.parser.error(f"--plot has to end with .png, .pdf or .svg, but is {str(options.plot)!r}")
    try:
        from tqdm import tqdm

        from .drift import format_report, measure_video, write_csv, write_json
        from .drift_plot import plot_drift
        from .frames import find_videos, read_frames
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed: `pip install opencv-python-headless matplotlib`."
        ) from error

    videos, drifts = find_videos(options.videos), []
    for path in videos:
        try:
            frames = tqdm(read_frames(path), desc=path.name, unit=" frames", leave=False, disable=None)
            drifts.append(measure_video(str(path), frames))
        except ValueError as error:  # the other videos are worth their numbers
            print(f"tokentrim drift: error: {error}", file=sys.stderr)
    if drifts:
        print(format_report(drifts))
        for path, write in ((options.json, write_json), (options.csv, write_csv)):
            if path is not None:
                write(path, drifts)
        if options.plot is not None:
            plot_drift(drifts).savefig(options.plot, dpi=110)
    return int(len(drifts) < len(videos))
