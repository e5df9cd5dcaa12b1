# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim generate`."""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from ..names import TRANSITIONS
from ..numbers import FPS, NUMBERS, SEED, whole
from ..request import check_options, describe, read_request
from ..runs import complete_run, how_to_go_on, own_run, save_run
from . import DTYPES, add_command, usage


OFFLOADS = ("none", "model", "sequential", "group")


def add_parser(commands) -> None:
    details = """\
A video grows as NAME.growing.mp4, which plays up to its last chunk whenever the process dies, with the decision of each
chunk on a line of NAME.growing.jsonl. When it is complete and verified, both lose the `.growing`; NAME.json holds the
prompt, the seed, the arguments and a fingerprint of the checkpoint.

Line n of the prompts, from 0, makes FOLDER/n-its-words.mp4 with the seed --seed + n. Finished videos are skipped:
start again after an interruption. An existing video that was made from other inputs is an error. A prompt that fails is
reported at the end, and the others continue. `accelerate launch` and `torchrun` split the prompts over processes, and
commands that run side by side share them too.

With --state-dir a run resumes from its last state, to the same file as an uninterrupted run. The folder also holds the
options, so --resume needs only --state-dir.

examples:
  tokentrim generate "a red fox trots through snow" --checkpoint self-forcing-diffusers --out fox.mp4
  tokentrim generate "a red fox" --checkpoint self-forcing-diffusers --out fox.mp4 --num-frames endless --state-dir run
  tokentrim generate --state-dir run --resume
  tokentrim generate --prompts prompts.txt --checkpoint self-forcing-diffusers --method tokentrim_plus --out videos
  accelerate launch -m tokentrim generate --prompts prompts.txt --checkpoint self-forcing-diffusers --out videos"""
    parser = add_command(commands, run, "generate", "videos of one prompt, or of a file of prompts", details)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="one prompt")
    add_files(parser.add_argument_group("files"))
    add_settings(parser.add_argument_group("the video"))
    add_machine(parser.add_argument_group("this machine"))


def add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompts", type=Path, metavar="FILE", help="instead of PROMPT: a prompt on each line")
    group.add_argument("--out", type=Path, help="an .mp4 file, or a folder with --prompts")
    group.add_argument("--checkpoint", help="folder or Hub id of a causal model in Diffusers format")
    group.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help="JSON of arguments of the call; may be repeated: later files override earlier ones, options override files",
    )
    group.add_argument("--image", type=Path, metavar="FILE", help="the first frame: PNG, JPEG or WebP")
    group.add_argument(
        "--video",
        type=Path,
        metavar="FILE",
        help="a video to continue: its last frames, up to 9 latent ones, begin the new video",
    )
    group.add_argument("--state-dir", type=Path, metavar="DIR", help="folder for resumable state")
    group.add_argument("--resume", action="store_true", help="resume the run in --state-dir")
    group.add_argument(
        "--save-every", type=whole(1).parse, metavar="N", help="chunks between two states (default: 10)"
    )


def add_settings(group: argparse._ArgumentGroup) -> None:
    numbers = {name: number.parse for name, number in NUMBERS.items()}
    group.add_argument(
        "--num-frames",
        type=read_num_frames,
        metavar="N",
        help="frames of each video; 0 or `endless`: until Ctrl-C (default: the config's, or 81)",
    )
    group.add_argument("--height", type=numbers["height"], metavar="N", help="in pixels (default: the checkpoint's)")
    group.add_argument("--width", type=numbers["width"], metavar="N", help="in pixels (default: the checkpoint's)")
    group.add_argument("--fps", type=FPS.parse, metavar="N", help="frames per second (default: the checkpoint's)")
    group.add_argument("--seed", type=SEED.parse, metavar="N", help="of the first prompt (default: 0)")
    group.add_argument(
        "--steps",
        type=numbers["num_inference_steps"],
        metavar="N",
        dest="num_inference_steps",
        help="denoising steps of a chunk (default: the checkpoint's)",
    )
    group.add_argument(
        "--guidance-scale",
        type=numbers["guidance_scale"],
        metavar="X",
        help="classifier-free guidance above 1 (default: 1)",
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="text that guidance moves away from")
    group.add_argument(
        "--method",
        type=read_name,
        help="plain, tokentrim, tokentrim_reference, tokentrim_plus or paper; or JSON of policies with settings (default: the checkpoint's)",
    )
    group.add_argument("--layout", type=read_name, help="which past frames are read: a name, or JSON with settings")
    group.add_argument(
        "--prompt-schedule", type=Path, metavar="FILE", help='JSON of prompts over time, {"20": "a green circle"}'
    )
    group.add_argument("--prompt-transition", choices=TRANSITIONS, help="what happens to the context at a change")
    group.add_argument(
        "--blend-chunks",
        type=numbers["blend_chunks"],
        metavar="N",
        help="chunks over which one prompt becomes the next",
    )


def add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", type=read_device, help="cpu, cuda, cuda:1, mps (default: an accelerator, or the CPU)"
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on a CPU, else bfloat16)")
    group.add_argument(
        "--offload", choices=OFFLOADS, help="parts that wait in main memory while they are not used (default: none)"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code in the checkpoint")


def read_num_frames(text: str) -> int:
    """Parse a number of frames; 0 for an endless video."""
    if text == "endless":
        return 0
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of frames, 0 or `endless`, but is {text!r}")
    return int(text) and NUMBERS["num_frames"].parse(text)


def read_device(text: str) -> str:
    if not re.fullmatch(r"(cpu|cuda|mps|xpu|npu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:1, mps, xpu or npu, but is {text!r}")
    return text


def read_name(text: str) -> str | dict | list:
    """A name, or JSON."""
    try:
        return json.loads(text) if text[:1] in ("{", "[") else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a name or JSON, but is {text!r}: {error}") from error


def run(options: argparse.Namespace) -> int:
    if options.prompt is not None and options.prompts is not None:
        options.parser.error("PROMPT is not allowed with --prompts")
    with usage(options):
        check_options(options)
    options = complete_run(options)
    with usage(options):
        check_options(options)  # those that a run began with
    is_first = os.environ.get("RANK", "0") == "0"  # of the launcher's processes
    request = read_request(options)
    with own_run(options.state_dir if is_first else None):
        if options.state_dir is not None and not options.resume and is_first:
            save_run(options, [job.state_dir for job in request.jobs])
        if is_first:
            print(*filter(None, [request.note, describe(request, options)]), sep="\n", file=sys.stderr, flush=True)
        from ..generate import generate_missing

        try:
            failed = generate_missing(
                request.jobs,
                options.checkpoint,
                options.dtype,
                options.fps,
                options.save_every,
                options.resume,
                device=options.device,
                offload=options.offload,
                trust_remote_code=options.trust_remote_code,
            )
        except KeyboardInterrupt:
            print(f"\nInterrupted. {how_to_go_on(options)}", file=sys.stderr)
            raise
    return int(failed > 0)
