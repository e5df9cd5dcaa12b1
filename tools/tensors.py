# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tensors of weights files, read, merged and written one by one."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .lora import Pair, check_alpha
from .pickles import check_sums
from .tensor_info import DTYPES, TensorInfo


CODES = {name: code for code, name in DTYPES.items()}
# The order of safetensors' own writer: wide types first, so that every tensor is aligned.
ORDER = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


class TensorReader:
    """Reads tensors of a file by name: from PyTorch's format as a map of the file, from safetensors one by one.

    Args:
        path (`Path`): the file.
        chosen (`str`, *optional*): the state dict in it; None where the file is one.
        tensors (`Mapping[str, TensorInfo]`): what it holds.
        keys (`Mapping[str, str]`, *optional*): keys in the state dict, by name. By default, they are the names.
    """

    def __init__(
        self,
        path: Path,
        chosen: str | None,
        tensors: Mapping[str, TensorInfo],
        keys: Mapping[str, str] | None = None,
    ):
        self.tensors, self.keys = tensors, keys or {name: name for name in tensors}
        self.state = None
        if all(tensor.file.suffix != ".safetensors" for tensor in tensors.values()):
            check_sums(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.state = state if chosen is None else state[chosen]

    def __call__(self, name: str) -> torch.Tensor:
        if self.state is not None:
            return self.state[self.keys[name]].detach()
        path = self.tensors[name].file
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(self.keys[name])
        except SafetensorError as error:
            raise ValueError(f"`path` must be a whole .safetensors file, but {path} is damaged: {error}") from error


def is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())


def merge_pair(weight: torch.Tensor, pair: Pair, path: Path, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """W + (alpha / rank) B A, in fp32; raises `ValueError` naming the LoRA's `path` if its alpha is not finite."""
    alpha = pair.alpha
    if isinstance(alpha, str):
        alpha = check_alpha(path, read(alpha).item(), alpha)
    scale = 1.0 if alpha is None else alpha / pair.rank
    return torch.addmm(weight.float(), read(pair.up).float(), read(pair.down).float(), alpha=scale)


def write_safetensors(
    path: Path, dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, tuple[int, ...]], read: Callable
) -> None:
    """
    Write what `safetensors.torch.save_file` writes, with one tensor in memory at a time.

    Args:
        path (`Path`): the file.
        dtypes (`Mapping[str, torch.dtype]`): of the tensors, by name.
        shapes (`Mapping[str, tuple[int, ...]]`): of the tensors, by name.
        read (`Callable`): gives a tensor by its name.
    """
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    order = sorted(names, key=lambda name: (ORDER.index(names[name]), name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        start, end = end, end + torch.Size(shapes[name]).numel() * dtypes[name].itemsize
        header[name] = {"dtype": CODES[names[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(read(name).contiguous().view(torch.uint8).numpy().data)
