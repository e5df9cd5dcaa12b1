# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The content of a weights file, from its header: names, shapes and dtypes, without reading tensors and without PyTorch."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

from .pickles import read_zip
from .tensor_info import DAMAGED, DTYPES, MAX_HEADER, TensorInfo, brief, listed, load_json, read_shape


FORMATS = (
    "a .pt file in the zip format of `torch.save`, a .safetensors file, its .safetensors.index.json, or their folder"
)


def read_header(path: Path) -> Any:
    """
    The content of a file, with a [`TensorInfo`] instead of each tensor. Nothing is imported or run.

    Args:
        path (`Path`): a `.pt` or `.safetensors` file, the index of sharded ones, or the folder of either.

    Raises:
        `ValueError`: there is no such file, it is not complete, or it needs more than tensors and plain values.
    """
    if not path.exists():
        raise ValueError(f"`path` must be {FORMATS}, but {path} does not exist.")
    try:
        if path.is_dir():
            return read_folder(path)
        if path.name.endswith(".index.json"):
            return read_index(path)
        return read_safetensors(path) if path.suffix == ".safetensors" else read_zip(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`path` must be a file of tensors alone, but {path} needs more to be unpickled, which could run any"
            f" code: {error}. Where you trust it, save its state dict as .safetensors first."
        ) from error
    except DAMAGED as error:
        raise ValueError(
            f"`path` must be a complete .safetensors file, or .pt file in the zip format of `torch.save`, but {path}"
            f" is truncated or something else: {error}"
        ) from error


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Sharded files by their index; without one, all files together."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return read_index(indices[0])
    if not files or indices:
        found = f"{len(indices)} indices and {len(files)} files of safetensors"
        raise ValueError(f"`path` must be {FORMATS}, but {folder} is a folder with {found}.")
    return merge(files)


def read_index(path: Path) -> dict[str, TensorInfo]:
    if path.stat().st_size > MAX_HEADER:
        raise EOFError(f"an index of {path.stat().st_size} bytes is more than {MAX_HEADER}")
    names = load_json(path.read_text())["weight_map"]
    for name in set(names.values()):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"`path` must be an index of .safetensors files beside it, but {path} names {name!r}.")
    tensors = merge([path.parent / name for name in sorted(set(names.values()))])
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"`path` must be complete, but the files of {path} have no {listed(missing)}.")
    return {name: tensors[name] for name in names}


def merge(files: list[Path]) -> dict[str, TensorInfo]:
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"`path` must be complete, but {file} does not exist.")
        tensors |= read_safetensors(file)
    return tensors


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Names in a file of the format: 8 bytes of length, a JSON header, and the tensors' bytes, gapless up to the end."""
    header = read_safetensors_header(path)
    header.pop("__metadata__", None)
    return {name: TensorInfo(DTYPES[each["dtype"]], tuple(each["shape"]), path) for name, each in header.items()}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    size = os.path.getsize(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise EOFError(f"its header ends at byte {length + 8} of {size}")
        if length > MAX_HEADER:
            raise EOFError(f"its header has {length} bytes, more than {MAX_HEADER}")
        header = load_json(file.read(length))
    if not isinstance(header, dict):
        raise TypeError(f"its header is a {type(header).__name__}")
    entries = {name: each for name, each in header.items() if name != "__metadata__"}
    end = 0
    for name, (start, stop) in sorted(read_offsets(path, entries).items(), key=lambda item: item[1]):
        if start != end:
            raise EOFError(f"its {brief(name)} should begin at byte {end} of the tensors, and begins at {start}")
        end = stop
    if length + 8 + end != size:
        raise EOFError(f"it should end at byte {length + 8 + end}, and ends at {size}")
    return header


def read_offsets(path: Path, entries: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends, as far as its dtype and shape need."""
    offsets = {}
    for name, each in entries.items():
        if each["dtype"] not in DTYPES:
            raise TypeError(f"its {brief(name)} has the unknown dtype {brief(each['dtype'])}")
        needs = TensorInfo(DTYPES[each["dtype"]], read_shape(name, each["shape"]), path).num_bytes
        start, stop = each["data_offsets"] if len(each["data_offsets"]) == 2 else (None, None)
        if not (type(start) is type(stop) is int and start >= 0 and stop - start == needs):
            given = brief(each["data_offsets"])
            raise EOFError(f"its {brief(name)} needs {needs} bytes by dtype and shape, but has the offsets {given}")
        offsets[name] = start, stop
    return offsets
