# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One way to write files and folders: whole, beside the target, under a temporary name, synced, then renamed.

A leaf that needs nothing but Python and filelock, so that the command can ask before PyTorch is imported.
"""

import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock


UNFINISHED = "unfinished"
A_DAY = 24 * 60 * 60  # seconds after which a temporary file belongs to a process that was killed


def check_target(
    name: str,
    path: str | os.PathLike,
    endings: Sequence[str] = (),
    is_ours: Callable[[Path], bool] | None = None,
    ours: str = "",
    given: Iterable[str | os.PathLike] = (),
) -> Path:
    """
    Refuse a file that cannot be written or may not be replaced, before any work is done.

    Args:
        name (`str`): the argument, for messages: `"path"` or `"--out"`.
        path (`str` or `os.PathLike`): the file; a link stands for the file that it leads to.
        endings (`Sequence[str]`): valid endings, such as `".mp4"`, in lower case; by default all are.
        is_ours (`Callable`, *optional*): whether an existing file may be replaced. By default every file may be.
        ours (`str`): such a file, in words.
        given (`Iterable`): input files, which are never replaced.

    Returns:
        `Path`: `path`.

    Raises:
        `OSError`: its folder does not exist or is read-only.
        `TypeError`, `ValueError`: `path` is not a path, has another ending, or is something that may not be replaced.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{_label(name)} must be a path, but is {path!r}.")
    path = Path(path)
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{_label(name)} must end with {_either(endings)}, but is {str(path)!r}.")
    target = _real(path)
    _check_folder(name, target.parent)
    if not os.path.lexists(target):
        return path
    if target.is_dir():
        raise ValueError(f"{_label(name)} must be a file, but {path} is a folder.")
    if not stat.S_ISREG(target.lstat().st_mode) or is_mount_point(target):
        raise ValueError(
            f"{_label(name)} must be a new or a plain file, but {path} is a device, pipe, link or mount point."
        )
    if any(os.path.exists(each) and os.path.samefile(each, target) for each in given):
        raise ValueError(f"{_label(name)} must not be an input, but {path} is one: it would be overwritten.")
    if is_ours is not None and target.stat().st_size and not is_ours(target):
        raise ValueError(
            f"{_label(name)} must be a new file or {ours}, but {path} is something else: name another file."
        )
    return path


@contextmanager
def whole_file(path: str | os.PathLike, unfinished: Path | None = None) -> Iterator[Path]:
    """
    A temporary path to write to, with the same ending; at the end of the `with` it becomes `path`. After an error, `path`
    is what it was. Processes that write the same path at once each write their own file, and the last one counts.

    Args:
        path (`str` or `os.PathLike`): the file.
        unfinished (`Path`, *optional*): the temporary path, where the caller holds a lock: what a killed process left there
            is overwritten. By default one that nothing else has.

    Raises:
        `OSError`: it cannot be written; the message names `path`.
    """
    target = _real(Path(path))
    _check_folder("path", target.parent)
    _remove_leftovers(target)
    unfinished, mode = (_temporary(target), "xb") if unfinished is None else (unfinished, "wb")
    try:
        unfinished.open(mode).close()
        if target.exists():
            shutil.copymode(target, unfinished)
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, target)
        sync(target.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(unfinished)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # the name that the caller knows
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes, unfinished: Path | None = None) -> None:
    """Write a file, all of it or nothing; text in UTF-8. See [`whole_file`]."""
    with whole_file(path, unfinished) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """
    A temporary folder to write into; at the end of the `with` it becomes `target`, which must not exist. Its name is always
    the same, so the caller holds a lock; what a killed process left in it is removed.

    Raises:
        `OSError`: it cannot be made or renamed.
    """
    unfinished = target.with_name(f".{target.name}.{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        sync_folder(unfinished)
        os.replace(unfinished, target)
        sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def locked(path: Path, wait: bool = False, once: bool = True) -> Iterator[None]:
    """
    Keep other processes from what `path` names. The lock is a file, `lock_of(path)`; a killed process loses it, and where
    the file system has no locks, nothing is locked.

    Args:
        path (`Path`): a file or folder, which need not exist.
        wait (`bool`): whether to wait for another process.
        once (`bool`): whether this process may not lock it a second time either.

    Raises:
        `Timeout`: it is locked.
    """
    lock = FileLock(lock_of(path), timeout=-1 if wait else 0, thread_local=False, is_singleton=not once)
    with suppress(NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            lock_of(path).unlink(missing_ok=True)
        lock.release()


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def numbered(path: str | os.PathLike, video: int, num_videos: int) -> Path:
    """The file of one video of a batch: x.mp4, or x-0.mp4, x-1.mp4 where there are several."""
    path = Path(path)
    return path if num_videos == 1 else path.with_name(f"{path.stem}-{video}{path.suffix}")


def is_decision_log(path: Path) -> bool:
    """Whether a file holds the decisions of a video, one chunk per line; its first line may have been cut by a kill."""
    with path.open("rb") as file:
        line = file.readline(2**24)
    begins = b'{"chunk": '
    if not line.endswith(b"\n"):
        return line[: len(begins)] == begins[: len(line)]
    try:
        decision = json.loads(line)
    except ValueError:
        return False
    return isinstance(decision, dict) and {"chunk", "severity"} <= set(decision)


def is_mount_point(path: Path) -> bool:
    """Whether another file system, or another file, is mounted at a path: it can be written, but not be renamed."""
    if os.path.ismount(path):
        return True
    mounts = Path("/proc/self/mountinfo")  # also those of the same device, as containers have them
    if not mounts.exists():
        return False
    points = {line.split()[4] for line in mounts.read_text(errors="replace").splitlines() if line.count(" ") > 4}
    return str(path).replace(" ", r"\040") in points


def sync(path: Path) -> None:
    """To the disk; of a folder, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders, on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """All that a folder holds, and the folder."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def _label(name: str) -> str:
    return name if name.startswith("-") else f"`{name}`"


def _either(endings: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(endings[:-1]), endings[-1]]))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        problem = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise FileNotFoundError(f"{_label(name)} must be in an existing folder, but {folder} {problem}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{_label(name)} must be in a folder that can be written, but {folder} is read-only.")


def _temporary(target: Path) -> Path:
    """Beside the target, with its ending, and hidden."""
    return target.with_name(f".{_beginning(target)}.{secrets.token_hex(4)}.{UNFINISHED}{target.suffix}")


def _beginning(target: Path) -> str:
    """A name has at most 255 bytes."""
    return target.stem.encode()[:80].decode(errors="ignore")


def _remove_leftovers(target: Path) -> None:
    """Temporary files of processes that were killed."""
    begins, ends = f".{_beginning(target)}.", f".{UNFINISHED}{target.suffix}"
    with suppress(OSError):
        for path in target.parent.iterdir():
            if path.name.startswith(begins) and path.name.removeprefix(begins).endswith(ends) and path.is_file():
                if time.time() - path.stat().st_mtime > A_DAY:
                    path.unlink(missing_ok=True)
