# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A folder that holds the state of a run: written whole or not at all, and read only if it is whole."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..tokentrim_checks import check, shown
from ..tokentrim_writing import locked, whole_folder
from .packing import pack_state, unpack_state


CODE_VERSION = "0.2.0"  # the package's, also where these files are loaded without it
STATE_VERSION = 1  # of the format
STATE, TENSORS = "state.json", "tensors.safetensors"
UNREADABLE = (  # what damaged and made-up states raise, of JSON, safetensors, PyTorch, and Python where they are used
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    AssertionError,
    OverflowError,
    SafetensorError,
)
state_logger = logging.getLogger("tokentrim.state")


def save_state(folder: str | os.PathLike, number: int, state: dict, keep: int = 0) -> Path:
    """
    Write a state as `folder/state-<number>` (where that is taken, `state-<number>-001`), then remove all
    others but the last `keep` with lower numbers.

    Args:
        folder (`str` or `os.PathLike`): made where it does not exist.
        number (`int`): orders the states of a folder.
        state (`dict`): nested dicts and lists of numbers, strings, `None` and tensors.
        keep (`int`): numbers whose states stay.

    Returns:
        `Path`: the state's folder.

    Raises:
        `OSError`: it cannot be written, as on a full disk; the last state is still there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"state-{number:08}", *(f"state-{number:08}-{again:03}" for again in range(1, 1000))]
    target = next(folder / name for name in names if not (folder / name).exists())  # the one before stays meanwhile
    _sweep(folder)
    plain, tensors = pack_state(state)
    try:
        with lock_state(folder), whole_folder(target) as unfinished:
            save_file(tensors, unfinished / TENSORS)
            sums = [_sha256(json.dumps(plain).encode()), _sha256_of_file(unfinished / TENSORS)]
            record = {"version": STATE_VERSION, "code": _code_versions(), "sha256": sums, "state": plain}
            (unfinished / STATE).write_text(json.dumps(record))
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        told = f"The state could not be written, the one before is still there: {error}"
        raise OSError(number, told, str(target)) from error
    lower = sorted({each for each in list_numbers(folder) if each < number})
    for other in _states(folder):
        if other != target and _number(other) not in lower[max(len(lower) - keep, 0) :]:
            shutil.rmtree(other, ignore_errors=True)
    return target


def load_state(folder: str | os.PathLike, number: int | None = None) -> dict:
    """The newest whole state of a folder, or the newest with a number. See [`find_state`]."""
    return find_state(folder, number)[1]


def find_state(folder: str | os.PathLike, number: int | None = None) -> tuple[Path, dict]:
    """
    The newest whole state of a folder, or the newest with a number, behind its own folder.

    Raises:
        `ValueError`: there is none, all are damaged, or it has another format. What other code wrote in this format is
            loaded, and told to the logger `tokentrim.state`: it goes on, but not to the same bits.
    """
    damaged = []
    for path in reversed([each for each in _states(Path(folder)) if number in (None, _number(each))]):
        try:
            record = json.loads((path / STATE).read_text())
            version, code, plain = record["version"], record.get("code", "unknown versions"), record["state"]
            text = json.dumps(plain)
        except UNREADABLE:
            damaged.append(path.name)
            continue
        ours = _code_versions()
        if version != STATE_VERSION:
            valid = f"a state of format {STATE_VERSION}, as {ours} writes it"
            raise ValueError(
                f"`state_dir` must hold {valid}, but {path} has format {shown(version)}, by {str(code)[:100]}."
            )
        try:
            if [_sha256(text.encode()), _sha256_of_file(path / TENSORS)] == record["sha256"]:
                if code != ours:
                    message = "%s was written by %s, and goes on with %s: bits may differ."
                    state_logger.warning(message, path, code, ours)
                state = unpack_state(plain, load_file(path / TENSORS))
                return path, {**state}  # a dict, or a `TypeError`
            damaged.append(path.name)
        except UNREADABLE as error:
            damaged.append(f"{path.name} ({brief_reason(error)})")
    valid = "a folder with a whole state" + (f", but {', '.join(damaged)} are damaged" if damaged else "")
    raise ValueError(f"`state_dir` must be {valid}; it is {str(folder)!r}.")


@contextmanager
def whole_state(path: Path, saved: Iterable[str] = ()) -> Iterator[None]:
    """What goes wrong inside, where the state of `path` is put into a run, is a `ValueError` that names it: a state may be
    whole and yet hold what no run saved. Errors about arguments pass, but for those that are `saved` in the state."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        told = str(error)
        argument = re.match(r"`(\w+)", told)
        if argument and argument[1] not in ("state", *saved):
            raise
        valid = f"a folder with a state that this pipeline can continue, but {path} is none"
        raise ValueError(f"`state_dir` must be {valid}: {told if argument else brief_reason(error)}") from error


def brief_reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def lock_state(folder: str | os.PathLike) -> Iterator[None]:
    """
    Keep other processes from a state folder. A process that is killed loses its lock.

    Raises:
        `ValueError`: another process uses it.
    """
    folder = Path(os.path.realpath(folder))
    lock = folder if os.access(folder.parent, os.W_OK) else folder / "run"
    try:
        with locked(lock, once=False) if folder.is_dir() else nullcontext():
            yield
    except Timeout:
        raise ValueError(f"`state_dir` must be a folder that no other process uses, but {folder} is in use.") from None


def has_state(folder: str | os.PathLike) -> bool:
    return bool(_states(Path(folder)))


def remove_states(folder: str | os.PathLike) -> None:
    """Of a run that is over."""
    _sweep(Path(folder))
    for path in _states(Path(folder)):
        shutil.rmtree(path, ignore_errors=True)


def list_numbers(folder: str | os.PathLike) -> list[int]:
    """Of the states of a folder, oldest first."""
    return [_number(path) for path in _states(Path(folder))]


def forget_states(folder: str | os.PathLike, number: int) -> None:
    """Remove the states with higher numbers, the newest first."""
    for path in reversed(_states(Path(folder))):
        if _number(path) > number:
            shutil.rmtree(path)


def fingerprint(module: torch.nn.Module) -> str:
    """Of a model's weights: names, shapes, dtypes, and 4,096 values of each, evenly spaced."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(pipe: Any) -> dict:
    """What a checkpoint says beside its weights, as JSON has it: the pipeline's settings and the scheduler's."""
    scheduler = {"scheduler": type(pipe.scheduler).__name__}
    scheduler |= {f"scheduler.{name}": value for name, value in pipe.scheduler.config.items()}
    own = {
        name: value for name, value in pipe.config.items() if not isinstance(value, (list, tuple)) and name != "fps"
    }
    hidden = [name for name in {**own, **scheduler} if name.split(".")[-1].startswith("_")]
    plain = {name: value for name, value in {**own, **scheduler}.items() if name not in hidden}
    return json.loads(json.dumps(plain, default=str))


def check_same(saved: dict, ours: dict, given: Iterable[str] = ()) -> None:
    """Refuse a checkpoint whose settings differ from those that the run began with, but for arguments that the call gave."""
    for name in sorted({*saved, *ours} - set(given)):
        check(saved.get(name) == ours.get(name), name, ours.get(name), f"{saved.get(name)!r}, as the run began")


def keep_method(state: dict, default: str) -> None:
    """A run keeps the method that it began with, whatever its checkpoint names by now: the one that the checkpoint named
    then, or `default`, where the call named none. Changes the state."""
    values = state["call"]["values"]
    if "method" in values and values["method"] is None:
        values["method"] = state["settings"].get("method") or default


def check_weights(saved: dict[str, str], models: dict[str, torch.nn.Module | None]) -> None:
    """Refuse other weights than those that the run began with, by their fingerprints."""
    again, preview = "preview_vae" in saved, models["preview_vae"]
    check((preview is not None) == again, "preview_vae", preview, "the stream's" if again else "None")
    for name, expected in saved.items():
        ours = fingerprint(models[name])
        check(ours == expected, name, f"of fingerprint {ours}", f"the weights that the run began with, {expected}")


def record_call(call: dict) -> dict:
    """A call's arguments as a state can hold them: values, and the names of those that have to be given again."""
    values, objects = {}, []
    for name, value in call.items():
        if name == "generator":
            value = [each.device.type for each in value] if isinstance(value, list) else value and value.device.type
        try:
            pack_state(value)
            values[name] = value
        except TypeError:
            objects.append(name)
    return {"values": values, "objects": objects}


def recall(record: dict, objects: dict) -> dict:
    """
    The arguments of a recorded call.

    Args:
        record (`dict`): of [`record_call`].
        objects (`dict`): those that it names.

    Raises:
        `ValueError`: one is missing, or one is given that the record holds.
    """
    missing, unknown = set(record["objects"]) - set(objects), set(objects) - set(record["objects"])
    valid = f"given again: the state cannot hold {sorted(record['objects'])}"
    check(not missing, ", ".join(sorted(missing)), None, valid)
    check(not unknown, ", ".join(sorted(unknown)), "given", "left out: a resumed run keeps its arguments")
    call = {**record["values"], **objects}
    devices = call["generator"]
    if isinstance(devices, list):
        call["generator"] = [torch.Generator(device) for device in devices]
    elif devices is not None:
        call["generator"] = torch.Generator(devices)
    return call


def _states(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("state-*") if path.is_dir())


def _number(path: Path) -> int:
    return int(path.name.split("-")[1])


def _code_versions() -> str:
    return f"tokentrim {CODE_VERSION} with torch {torch.__version__}"


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed while they saved."""
    for path in folder.glob(".state-*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(2**20):
            digest.update(content)
    return digest.hexdigest()
