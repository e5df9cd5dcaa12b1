# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a weights file holds, from its header alone: names, shapes and dtypes, without a tensor and without PyTorch."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple


FORMATS = (
    "a .pt file in the zip format of `torch.save`, a .safetensors file, its .safetensors.index.json, or their folder"
)
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
SIZES = {"64": 8, "32": 4, "16": 2, "t8": 1}  # bytes, by the end of a dtype's name


DAMAGED = (  # what Python's readers raise for a file that is none of theirs
    zipfile.BadZipFile,
    zlib.error,
    json.JSONDecodeError,
    UnicodeDecodeError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    NotImplementedError,
    EOFError,
    OSError,
)


class TensorInfo(NamedTuple):
    """A tensor in a file."""

    dtype: str  # as PyTorch names it
    shape: tuple[int, ...]
    file: Path

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def num_bytes(self) -> int:
        size = 1 if "float8" in self.dtype or self.dtype == "bool" else SIZES[self.dtype[-2:]]
        return prod(self.shape) * size


def read_header(path: Path) -> Any:
    """
    What a file holds, with a [`TensorInfo`] in the place of each tensor. Nothing is imported or run.

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
    names = json.loads(path.read_text())["weight_map"]
    tensors = merge([path.parent / name for name in sorted(set(names.values()))])
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"`path` must be complete, but the files of {path} have no {', '.join(missing)}.")
    return {name: tensors[name] for name in names}


def merge(files: list[Path]) -> dict[str, TensorInfo]:
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"`path` must be complete, but {file} does not exist.")
        tensors |= read_safetensors(file)
    return tensors


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Names in a file of the format: 8 bytes of length, a JSON header, and the tensors' bytes up to the end."""
    header = read_safetensors_header(path)
    header.pop("__metadata__", None)
    return {name: TensorInfo(DTYPES[each["dtype"]], tuple(each["shape"]), path) for name, each in header.items()}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    size = os.path.getsize(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise EOFError(f"its header ends at byte {length + 8} of {size}")
        header = json.loads(file.read(length))
    end = (
        length
        + 8
        + max((each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"), default=0)
    )
    if end != size:
        raise EOFError(f"it should end at byte {end}, and ends at {size}")
    return header


def read_zip(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(1) == pickle.PROTO:
            raise zipfile.BadZipFile("it is a bare pickle, as `torch.save` wrote before PyTorch 1.6: save it again")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise zipfile.BadZipFile("it is a zip file that `torch.save` did not write")
        with archive.open(names[0]) as file:
            try:
                return Unpickler(file, path).load()
            except (pickle.UnpicklingError, *DAMAGED):
                raise
            except Exception as error:  # bytes that are no pickle can raise whatever they like
                raise zipfile.BadZipFile(f"its pickle is damaged: {type(error).__name__}: {error}") from error


def check_sums(path: Path) -> None:
    """
    Read a file of `torch.save` as a whole, and compare it with the checksums that it holds; PyTorch does not.

    Raises:
        `ValueError`: a part of it is not what was written.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            damaged = archive.testzip()
        except DAMAGED as error:
            damaged = str(error)
    if damaged is not None:
        raise ValueError(
            f"`path` must be whole, but {path} is damaged: checksums do not fit ({damaged}). Download it again; one that"
            " was saved without checksums must be saved again."
        )


class Unpickler(pickle.Unpickler):
    """Plain values, and what the header of a tensor says; a storage is replaced by its dtype, and any other class or
    function is refused."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"):
            return getattr(self, name)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in (*DTYPES.values(), "Size"):
            return tuple if name == "Size" else name
        raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")

    def persistent_load(self, key: tuple) -> str:
        return key[1]  # ("storage", its class, its file, device, size)

    def _rebuild_tensor_v2(self, storage: str, offset: int, size: tuple, *_: Any) -> TensorInfo:
        return TensorInfo(storage, tuple(size), self.path)

    def _rebuild_tensor_v3(self, storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> TensorInfo:
        return TensorInfo(dtype, tuple(size), self.path)

    def _rebuild_parameter(self, tensor: TensorInfo, *_: Any) -> TensorInfo:
        return tensor
