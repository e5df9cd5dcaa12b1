# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Folders to write: new or empty, refused before the work where they are neither, and complete when they appear."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from ..tokentrim_writing import UNFINISHED, locked, sync, sync_folder, whole_folder


def check_new_folder(out: Path, name: str = "`out`") -> None:
    """
    Refuse a folder that holds something, or that cannot be written.

    Args:
        out (`Path`): the folder; a link stands for what it leads to.
        name (`str`): the argument, for the message.

    Raises:
        `OSError`: it cannot be written.
        `ValueError`: it is not a folder, or not empty.
    """
    folder = Path(os.path.realpath(out))
    if not folder.exists():
        folder = next(parent for parent in folder.parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise ValueError(f"{name} must be a new or an empty folder, but is {str(out)!r}, and {folder} is a file.")
    elif not folder.is_dir() or list_content(folder):
        raise ValueError(f"{name} must be a new or an empty folder, but is {str(out)!r}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{name} must be a folder that can be written, but {folder} is read-only.")


def list_content(folder: Path) -> list[Path]:
    """What a folder holds, but for locks and for what a killed process left."""
    return [
        path
        for path in folder.iterdir()
        if not (path.name[0] == "." and path.name.endswith((".lock", f".{UNFINISHED}")))
    ]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """
    A folder to write into, which becomes `out` at the end of the `with`. A failure leaves nothing behind. An empty folder
    that exists stays the folder that it is, as it may be a mount point: files move into it when all are written.

    Raises:
        `OSError`: it cannot be written, or another process is writing it.
        `ValueError`: it is not empty.
    """
    folder = Path(os.path.realpath(out))
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = os.access(folder.parent, os.W_OK)
    try:
        with locked(folder if beside else folder / "folder"):
            check_new_folder(out)
            with filled(folder) if folder.exists() else whole_folder(folder) as unfinished:
                yield unfinished
    except Timeout as error:
        raise OSError(f"{out} is being written by another process.") from error


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A folder inside an empty one, whose content moves up at the end of the `with`: folders first, then files."""
    unfinished, moved = folder / f".{UNFINISHED}", []
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
    unfinished.mkdir()
    try:
        yield unfinished
        sync_folder(unfinished)
        for path in sorted(unfinished.iterdir(), key=lambda path: (path.is_file(), path.name)):
            moved.append(path.rename(folder / path.name))
        sync(folder)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
