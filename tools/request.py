# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""From the options of `tokentrim generate` to jobs: all that can be refused before PyTorch is imported is refused here."""

import argparse
from pathlib import Path
from typing import NamedTuple

from .checkpoints import check_code, check_parts, check_size, find_checkpoint, read_fps, read_json
from .jobs import NUM_FRAMES, Job, check_inputs, check_jobs, check_settings, read_jobs, read_schedule, read_settings
from .names import INDEX, check_layout, check_method


# Options that are arguments of the call.
SETTINGS = (
    "method layout prompt_transition blend_chunks num_inference_steps height width guidance_scale negative_prompt"
).split()


class Request(NamedTuple):
    jobs: list[Job]
    folder: Path | None  # of the checkpoint; `None` where it has to be downloaded
    note: str | None  # of lines of the prompts that are left out


def check_options(options: argparse.Namespace) -> None:
    """
    Options by themselves.

    Raises:
        `ValueError`: the option, its value and what is valid are in the message.
    """
    if options.prompt is not None and not options.prompt.strip():
        raise ValueError(f"PROMPT must have a word, but is {options.prompt!r}")
    is_file = options.out is not None and options.out.suffix.lower() == ".mp4"
    if options.prompt is not None and options.out is not None and not is_file:
        raise ValueError(f"--out must end with .mp4 for one prompt, but is {str(options.out)!r}")
    if options.prompts is not None and is_file:
        raise ValueError(f"--out must be a folder for --prompts, but is {str(options.out)!r}")
    if options.image is not None and options.video is not None:
        raise ValueError("--image and --video do not go together: the image is the first frame, as the video's is")
    if options.method is not None:
        check_method("--method", options.method)
    if options.layout is not None:
        check_layout("--layout", options.layout)
    if options.negative_prompt is not None and options.guidance_scale is not None and options.guidance_scale <= 1:
        raise ValueError(f"--negative-prompt needs --guidance-scale above 1, but it is {options.guidance_scale}")


def read_request(options: argparse.Namespace) -> Request:
    """
    What the files say that options name, and the checkpoint of itself.

    Raises:
        `OSError`, `ValueError`: something makes no video, or would replace a file that is not ours.
    """
    given = {"--prompts": options.prompts, "--image": options.image, "--video": options.video}
    given["--prompt-schedule"] = options.prompt_schedule
    check_inputs(given)
    if options.image is not None:
        from ..tokentrim_frames.pictures import open_picture  # needs Pillow, help does not

        open_picture(options.image)
    for path in options.config:
        check_inputs({"--config": path})
    settings = read_settings(options.config)
    settings |= {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    if options.num_frames is not None:
        settings["num_frames"] = options.num_frames or None
    if options.prompt_schedule is not None:
        settings["prompt_schedule"] = read_schedule(options.prompt_schedule)
    check_settings(settings)
    if options.negative_prompt is not None and (settings.get("guidance_scale") or 1) <= 1:
        raise ValueError("--negative-prompt needs --guidance-scale above 1, but it is 1 by default.")
    files = tuple((name, path) for name in ("image", "video") if (path := getattr(options, name)) is not None)
    note = None
    if options.prompts is None:
        jobs = [Job(options.prompt, options.seed, options.out, settings, options.state_dir, files)]
    else:
        jobs, note = read_jobs(options.prompts, options.out, options.seed, settings, options.state_dir)
        jobs = [job._replace(given=files) for job in jobs]
    check_jobs(jobs, [path for path in (*given.values(), *options.config) if path is not None])
    folder = find_checkpoint(options.checkpoint)
    if folder is not None:
        check_parts(folder)
        check_code(folder, options.trust_remote_code)
        check_size(folder, settings)
    return Request(jobs, folder, note)


def describe(request: Request, options: argparse.Namespace) -> str:
    """The first line: what will be made, of what."""
    index = {} if request.folder is None else read_json(request.folder / INDEX)
    settings = request.jobs[0].settings
    num_frames = settings.get("num_frames", NUM_FRAMES)
    length = "video without an end" if num_frames is None else f"{num_frames} frames"
    fps = options.fps or (None if request.folder is None else read_fps(request.folder))
    if num_frames is not None and fps is not None:
        length += f" ({num_frames / fps:.1f} s)"
    method = settings.get("method") or index.get("method") or "tokentrim"
    named = method if isinstance(method, str) else "of settings"
    videos = f"{len(request.jobs)} x {length}" if len(request.jobs) > 1 else length
    return f"{options.out}: {videos}, method {named}, checkpoint {options.checkpoint}"
