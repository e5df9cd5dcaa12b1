# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What is asked for: prompts and arguments from files, as jobs; and whether their files can be written. No PyTorch here."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..tokentrim_writing import check_target, is_decision_log, numbered
from .names import ARGUMENTS, ROLLOUTS, TRANSITIONS, check_layout, check_method, check_name
from .numbers import NUMBERS


NUM_FRAMES = 81  # of a call that says nothing
OUTPUT_TYPES = ("np", "pt", "pil")  # that make a video
RECORD = {"prompt", "seed", "arguments", "weights"}  # keys of the .json beside a video


class Job(NamedTuple):
    prompt: str
    seed: int
    path: Path
    settings: dict  # arguments of the call
    state_dir: Path | None = None  # where the run is saved
    given: tuple[tuple[str, Path], ...] = ()  # files of `image` and `video`

    def arguments(self) -> dict:
        """As JSON has them; of files the name and a fingerprint."""
        files = {name: f"{path.name}, sha256 {hash_file(path)}" for name, path in self.given}
        return {"num_frames": NUM_FRAMES, **self.settings, **files}

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
            if not isinstance(content, dict):
                raise ValueError(f"it holds {content!r:.60}")
        except ValueError as error:
            raise ValueError(f"{path} must hold one JSON object of arguments of the call: {error}") from error
        settings |= content
    return settings


def check_settings(settings: dict) -> None:
    """
    What can be told of arguments without a checkpoint.

    Raises:
        `ValueError`: one is unknown, given otherwise, or makes no video.
    """
    for name, value in settings.items():
        if name not in ARGUMENTS:
            raise ValueError(f"`config` must be arguments of the call, {', '.join(ARGUMENTS)}, but is {name!r}.")
        if value is None:
            continue
        if name in NUMBERS and not (name == "num_inference_steps" and isinstance(value, dict)):
            NUMBERS[name].check(name, value)
        elif name == "method":
            check_method("`method`", value)
        elif name == "layout":
            check_layout("`layout`", value)
        elif name == "rollout":
            check_name("`rollout`", value, ROLLOUTS)
        elif name == "output_type":
            check_name("`output_type`", value, OUTPUT_TYPES)
        elif name == "prompt_transition" and not isinstance(value, dict):
            check_name("`prompt_transition`", value, TRANSITIONS)


def read_schedule(path: Path) -> dict[int, str]:
    """
    Prompts by chunk, from a JSON file.

    Raises:
        `ValueError`: it does not hold one JSON object whose keys are chunks.
    """
    try:
        schedule = {int(chunk): prompt for chunk, prompt in json.loads(read_text(path)).items()}
    except (AttributeError, ValueError) as error:
        valid = 'one JSON object of chunks and prompts, {"20": "a green circle"}'
        raise ValueError(f"{path} must hold {valid}: {error}") from error
    for chunk, prompt in schedule.items():
        for text in prompt if isinstance(prompt, list) else [prompt]:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path} must hold a prompt for each chunk, but chunk {chunk} has {text!r}.")
    return schedule


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


def check_inputs(paths: dict[str, Path | None]) -> None:
    """
    Whether the files that options name can be read.

    Raises:
        `ValueError`: the option and the file are in the message.
    """
    for option, path in paths.items():
        if path is not None and not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise ValueError(f"{option} must be a file, but {path} {problem}.")
        if path is not None and not os.access(path, os.R_OK):
            raise ValueError(f"{option} must be a file that can be read, but {path} cannot.")


def check_writable(folder: Path, option: str) -> None:
    """
    Raise unless files can be written in a folder, or in the one that it will be made in. Nothing is left there.

    Raises:
        `OSError`: what is in the way.
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(2**12))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{option}: {folder} cannot be written: {error.strerror}") from error


def check_jobs(jobs: Sequence[Job], given: Iterable[Path] = ()) -> None:
    """
    Whether all that jobs make can be written, and replaces nothing but what this command wrote.

    Args:
        jobs (`Sequence[Job]`): one for each video.
        given (`Iterable[Path]`): files that options name.

    Raises:
        `OSError`: a folder cannot be written, or a video's name is a folder's.
        `ValueError`: a file beside a video is something else, or one of those that are given.
    """
    for option, paths in (
        ("--out", {job.path.parent: None for job in jobs}),
        ("--state-dir", {job.state_dir.parent: None for job in jobs if job.state_dir is not None}),
    ):
        for folder in paths:
            check_writable(folder, option)
    given = [*given, *(path for job in jobs for _, path in job.given)]
    for job in jobs:
        for grows, paths in ((False, job.videos()), (True, job.videos(job.growing))):
            for path in paths:
                if path.is_dir():
                    raise OSError(f"--out: {path} is a folder.")
                if path.parent.is_dir() and not job.is_done():
                    check_video(path, grows, given)


def check_video(path: Path, grows: bool, given: Sequence[Path]) -> None:
    """Refuse to write a video, and what comes beside it, over something else. One that grows has no record yet."""
    ours = f"one that this command wrote ({path.name} has {path.stem}.json and {path.stem}.jsonl beside it)"
    record, log = path.with_suffix(".json"), path.with_suffix(".jsonl")
    check_target("--out", path, (), None if grows else lambda _: record.is_file() and is_record(record), ours, given)
    check_target("--out", record, (), is_record, ours, given)
    check_target("--out", log, (), is_decision_log, ours, given)


def is_record(path: Path) -> bool:
    """Whether a file is the .json beside a video that says what it was made of."""
    try:
        record = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(record, dict) and RECORD <= set(record)


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(2**20):
            digest.update(content)
    return digest.hexdigest()[:16]
