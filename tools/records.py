# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a video was made of, in a file beside it, so that another one is never taken for it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..tokentrim_writing import write_whole
from .jobs import Job
from .names import INDEX


PIECES, PIECE = 64, 2**16  # of a large file, evenly spaced
UNCOMPARED = ("checkpoint", "version")  # where it lay, and what made it: neither must be the same


def fingerprint_folder(checkpoint: Path) -> str:
    """Of a checkpoint's index and its components' files: names and sizes, small files whole and pieces of large ones."""
    index = json.loads((checkpoint / INDEX).read_text())
    parts = sorted(name for name, value in index.items() if isinstance(value, list) and (checkpoint / name).is_dir())
    files = [path for part in parts for path in sorted((checkpoint / part).rglob("[!.]*")) if path.is_file()]
    digest = hashlib.sha256()
    for path in (checkpoint / INDEX, *files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(checkpoint)} {size}\n".encode())
        with path.open("rb") as file:
            if size <= PIECES * PIECE:
                digest.update(file.read())
                continue
            for piece in range(PIECES):
                file.seek((size - PIECE) * piece // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def make_record(job: Job, fps: float, dtype: str, checkpoint: str, weights: str) -> dict:
    """All that decides a video, as JSON has it; `weights` is the checkpoint's fingerprint."""
    record = {"prompt": job.prompt, "seed": job.seed, "fps": fps, "arguments": job.arguments(), "dtype": dtype}
    record |= {"weights": weights, "checkpoint": checkpoint, "version": __version__}
    return json.loads(json.dumps(record))


def write_record(path: Path, record: dict) -> None:
    """The caller holds the lock of the video."""
    write_whole(path, json.dumps(record), path.with_suffix(".growing.json"))


def read_prompt(video: Path) -> str | None:
    """The prompt of a video, by the record beside it; `None` where none says it."""
    try:
        prompt = json.loads(video.with_suffix(".json").read_text())["prompt"]
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return None
    return prompt if isinstance(prompt, str) else None


def check_records(jobs: Sequence[Job], records: Sequence[dict]) -> str | None:
    """
    Refuse a video that is there, but is not the one that is asked for.

    Args:
        jobs (`Sequence[Job]`): those whose videos are there.
        records (`Sequence[dict]`): what is asked for.

    Returns:
        What is to be said of videos that another version made, if there are any.

    Raises:
        `ValueError`: what differs, of the first one.
    """
    others, versions = {}, {}
    for job, record in zip(jobs, records):
        for path in job.videos():
            try:
                made = json.loads(path.with_suffix(".json").read_text())
                different = list_differences(made, record)
            except (OSError, ValueError, AttributeError):
                different = [f"no {path.stem}.json beside it says what it was made of"]
            if different:
                others[path] = different
            elif made.get("version") != __version__:
                versions[path] = str(made.get("version"))
    if others:
        path, different = next(iter(others.items()))
        more = f" So are {len(others) - 1} others." if len(others) > 1 else ""
        raise ValueError(
            f"{path} is there already, but is another video: {'; '.join(different)}.{more} Name another --out, or move it."
        )
    made_by = ", ".join(sorted(set(versions.values())))
    note = f"{len(versions)} of them by version {made_by}; this is {__version__}, which may make other frames"
    return note if versions else None


def list_differences(made: dict, asked: dict) -> list[str]:
    made, asked = ({**each, **each.get("arguments", {}), "arguments": None} for each in (made, asked))
    names = [name for name in {**asked, **made} if name not in UNCOMPARED and made.get(name) != asked.get(name)]
    return [
        f"{name} {brief(made, name)}, {'now' if name not in asked else 'not'} {brief(asked, name)}" for name in names
    ]


def brief(record: dict, name: str) -> str:
    text = repr(record[name]) if name in record else "not given"
    return text if len(text) <= 80 else f"{text[:77]}..."
