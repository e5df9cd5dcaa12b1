# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a file says of a tensor, and how much of it is believed. Without PyTorch."""

import json
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple


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
SIZES = {"64": 8, "32": 4, "16": 2, "t8": 1}  # bytes, by the end of a dtype's name


MAX_HEADER = 100 * 2**20  # bytes, of a header or a pickle; those of published models have less than a tenth
MAX_SIDE = 2**40  # of a tensor
MAX_DIMENSIONS = 16

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
    RecursionError,
    OverflowError,
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


def read_shape(name: Any, shape: Any) -> tuple[int, ...]:
    """A tensor's shape, or an error: sides are whole numbers."""
    is_shape = isinstance(shape, (list, tuple)) and len(shape) <= MAX_DIMENSIONS
    if not (is_shape and all(type(side) is int and 0 <= side <= MAX_SIDE for side in shape)):
        raise TypeError(f"its {brief(name)} has the shape {brief(shape)}")
    return tuple(shape)


def load_json(text: str | bytes) -> Any:
    """Parse JSON of a file; whatever is wrong with it is an `EOFError` in words."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise EOFError(f"it is no JSON: {error}") from error


def brief(value: Any) -> str:
    """A value of a file in a message: at most a line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # of a number of too many digits
        return f"a {type(value).__name__}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names in a message: the first ones, and how many more."""
    shown = ", ".join(str(name)[:100] for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
