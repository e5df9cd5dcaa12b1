# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Files of `torch.save`, without a tensor: their pickle is read, and nothing in it is imported or run."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .tensor_info import DAMAGED, DTYPES, MAX_DIMENSIONS, MAX_HEADER, TensorInfo, brief, read_shape


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


def read_zip(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(1) == pickle.PROTO:
            raise zipfile.BadZipFile("it is a bare pickle, as `torch.save` wrote before PyTorch 1.6: save it again")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise zipfile.BadZipFile("it is a zip file that `torch.save` did not write")
        members = {each.filename: each for each in archive.infolist()}
        compressed = [name for name, each in members.items() if each.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise zipfile.BadZipFile(f"`torch.save` compresses nothing, but {brief(compressed[0])} is compressed")
        if members[names[0]].file_size > MAX_HEADER:
            raise zipfile.BadZipFile(f"its pickle has {members[names[0]].file_size} bytes, more than {MAX_HEADER}")
        sizes = {name: each.file_size for name, each in members.items()}
        with archive.open(names[0]) as file:
            try:
                return Unpickler(file, path, names[0].removesuffix("data.pkl"), sizes).load()
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


class Storage(NamedTuple):
    """The values that a tensor of a pickle reads."""

    dtype: str
    num_values: int


class Unpickler(pickle.Unpickler):
    """Plain values, and what the header of a tensor says; a storage is replaced by its dtype and size, and any other class
    or function is refused.

    Args:
        file: the pickle.
        path (`Path`): the file that it is in.
        folder (`str`): of the members of the zip file, ends with a slash.
        sizes (`Mapping[str, int]`): bytes of each member.
    """

    def __init__(self, file: Any, path: Path, folder: str, sizes: Mapping[str, int]):
        super().__init__(file)
        self.path, self.folder, self.sizes = path, folder, sizes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return make_dict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"):
            return getattr(self, name)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in (*DTYPES.values(), "Size"):
            return make_size if name == "Size" else name
        raise pickle.UnpicklingError(f"Unsupported class {brief(module)[1:-1]}.{brief(name)[1:-1]}")

    def persistent_load(self, key: tuple) -> Storage:
        _, dtype, name, _, num_values = key  # ("storage", its class, its file, device, number of values)
        has, (one,) = self.sizes.get(f"{self.folder}data/{name}"), read_shape(name, (num_values,))
        needs = TensorInfo(dtype, (one,), self.path).num_bytes
        if has != needs:
            raise EOFError(f"its storage {brief(name)} needs {needs} bytes, and has {has}")
        return Storage(dtype, num_values)

    def _rebuild_tensor_v2(self, storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> TensorInfo:
        return self._make(storage, offset, size, stride, storage.dtype, storage.num_values)

    def _rebuild_tensor_v3(self, storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> TensorInfo:
        num_bytes = TensorInfo(storage.dtype, (storage.num_values,), self.path).num_bytes  # of an untyped storage
        return self._make(
            storage, offset, size, stride, dtype, num_bytes // TensorInfo(dtype, (), self.path).num_bytes
        )

    def _make(self, storage: Storage, offset: int, size: tuple, stride: tuple, dtype: str, has: int) -> TensorInfo:
        size, stride, (offset,) = (read_shape("tensor", each) for each in (size, stride, (offset,)))
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if 0 not in size and last >= has:
            raise EOFError(f"a tensor of shape {size} reads value {last} of a storage of {has}")
        return TensorInfo(dtype, size, self.path)

    def _rebuild_parameter(self, tensor: TensorInfo, *_: Any) -> TensorInfo:
        return tensor


def make_dict() -> OrderedDict:
    """As `torch.save` writes one: empty, and filled by the pickle. Copies of a large one would take any memory."""
    return OrderedDict()


def make_size(sides: Sequence[int] = ()) -> tuple[int, ...]:
    return read_shape("torch.Size", tuple(sides[: MAX_DIMENSIONS + 1]))
