# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What is asked for: prompts and arguments from files, as jobs; and whether their files can be written."""

import inspect
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..pipeline_tokentrim import TokenTrimPipeline
from ..tokentrim_checks import check, check_choice, check_int
from ..tokentrim_frames.mp4 import numbered


NUM_FRAMES = 81  # of a call that says nothing
GIVEN = {"self", "prompt", "generator", "return_dict"}  # by `generate` itself


class Job(NamedTuple):
    prompt: str
    seed: int
    path: Path
    settings: dict  # arguments of the call
    state_dir: Path | None = None  # where the run is saved

    def arguments(self) -> dict:
        return {"num_frames": NUM_FRAMES, **self.settings}

    @property
    def growing(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.growing{self.path.suffix}")

    def videos(self, path: Path | None = None) -> list[Path]:
        """Its files, or those that are numbered as they are: one, but for `num_videos_per_prompt`."""
        num_videos = self.settings.get("num_videos_per_prompt", 1)
        return [numbered(path or self.path, video, num_videos) for video in range(num_videos)]

    def is_done(self) -> bool:
        return all(path.is_file() for path in self.videos())


def read_text(path: Path) -> str:
    """A file in UTF-8, with or without the mark that some editors begin it with."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, but its byte {error.start} is none.") from error


def read_settings(paths: Sequence[Path]) -> dict:
    """
    Arguments of the call from JSON files; where two name the same, the later one counts.

    Raises:
        `ValueError`: a file does not hold one JSON object.
    """
    settings = {}
    for path in paths:
        try:
            content = json.loads(read_text(path))
            check(isinstance(content, dict), path.name, content, "a JSON object")
        except ValueError as error:
            raise ValueError(f"{path} must hold one JSON object of arguments of the call: {error}") from error
        settings |= content
    return settings


def check_settings(settings: dict) -> None:
    """
    What can be told of arguments without a checkpoint.

    Raises:
        `TypeError`, `ValueError`: one is unknown, given otherwise, or makes no video.
    """
    known = sorted(set(inspect.signature(TokenTrimPipeline.__call__).parameters) - GIVEN)
    for name in settings:
        check(name in known, "config", name, f"arguments of the call, {', '.join(known)}")
    check_choice("output_type", settings.get("output_type", "np"), ["np", "pt", "pil"])
    check_int("num_videos_per_prompt", settings.get("num_videos_per_prompt", 1), 1)


def read_schedule(path: Path) -> dict[int, str]:
    """
    Prompts by chunk, from a JSON file.

    Raises:
        `ValueError`: it does not hold one JSON object whose keys are chunks.
    """
    try:
        return {int(chunk): prompt for chunk, prompt in json.loads(read_text(path)).items()}
    except (AttributeError, ValueError) as error:
        valid = 'one JSON object of chunks and prompts, {"20": "a green circle"}'
        raise ValueError(f"{path} must hold {valid}: {error}") from error


def read_jobs(
    prompts: Path, out: Path, seed: int, settings: dict, state_dir: Path | None = None
) -> tuple[list[Job], str | None]:
    """
    A job for each line of a file that has words: line n, from 0, makes out/n-its-words.mp4 with seed `seed` + n, and saves
    to state_dir/n-its-words.

    Returns:
        `list[Job]`, and what is to be said of the lines that are left out, if there are any.

    Raises:
        `ValueError`: no line has words, or the file is no text.
    """
    jobs, left_out = [], {}
    for number, line in enumerate(read_text(prompts).rstrip("\n").split("\n")):
        if not any(map(str.isalnum, line)):
            left_out[number] = line.strip()
            continue
        words = re.sub(r"\W+", "-", line.lower()).strip("-")[:60]
        words = words.encode()[:180].decode(errors="ignore")  # a file's name has at most 255 bytes
        name = f"{number:05}-{words}"
        folder = None if state_dir is None else state_dir / name
        jobs.append(Job(line.strip(), seed + number, out / f"{name}.mp4", settings, folder))
    if not jobs:
        raise ValueError(f"{prompts} must hold a prompt on each line, but no line has a word.")
    told = ", ".join(f"{number}" + (f" ({line[:20]!r})" if line else "") for number, line in left_out.items())
    note = f"{prompts}: no video for the lines without a word, counted from 0: {told}" if left_out else None
    return jobs, note


def check_writable(folder: Path, option: str) -> None:
    """
    Make a folder, and raise unless files can be written there.

    Raises:
        `OSError`: what is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**12))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{option}: {folder} cannot be written: {error.strerror}") from error


def check_jobs(jobs: Sequence[Job]) -> None:
    """
    Whether all that jobs make can be written.

    Raises:
        `OSError`: a folder cannot be, or a video's name is a folder's.
    """
    for option, paths in (
        ("--out", {job.path.parent: None for job in jobs}),
        ("--state-dir", {job.state_dir.parent: None for job in jobs if job.state_dir is not None}),
    ):
        for folder in paths:
            check_writable(folder, option)
    for path in (path for job in jobs for path in job.videos()):
        if path.is_dir():
            raise OSError(f"--out: {path} is a folder.")
