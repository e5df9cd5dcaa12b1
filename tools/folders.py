# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that several processes may want to write, and that a process may be killed while it writes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..tokentrim_checks import check


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """
    Keep other processes from writing the same file or folder; a process that is killed keeps nobody.

    Raises:
        `Timeout`: another one is writing it, and is not waited for.
    """
    lock = lock_of(path)
    with FileLock(lock, timeout=-1 if wait else 0):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_new_folder(out: Path) -> None:
    fresh = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(fresh, "out", str(out), "a new or an empty folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """
    A folder to write into, which becomes `out` at the end of the `with`. A failure leaves nothing behind; what a process
    that was killed left behind is removed by the next one.

    Raises:
        `OSError`: another process is writing it.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        with locked(out, wait=False):
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                yield unfinished
                if out.exists():
                    out.rmdir()
                os.replace(unfinished, out)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except Timeout as error:
        raise OSError(f"{out} is being written by another process.") from error
