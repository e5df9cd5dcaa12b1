# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""States as plain values that JSON can hold, and the tensors in them."""

from typing import Any

import numpy as np
import torch


def pack_state(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """
    A state as plain values and tensors on the CPU, all of them copies.

    Args:
        state: nested dicts and lists of numbers, strings, `None` and tensors.

    Raises:
        `TypeError`: it holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _without_tensors(state, tensors), tensors


def unpack_state(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A copy of the state that was packed, with its tensors where they were."""
    return _with_tensors(plain, tensors)


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The same, with a reference where each tensor was; the tensors go to `tensors`."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name, "device": value.device.type}
    if isinstance(value, dict):
        return {"dict": [[_without_tensors(each, tensors) for each in item] for item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(each, tensors) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"A state cannot hold {value!r}: numbers, strings, tensors, and lists and dicts of them.")


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    if isinstance(value, dict) and "tensor" in value:
        # A copy: in the file a tensor may begin anywhere, and a matrix product's last bits depend on that.
        return tensors[value["tensor"]].clone().to(value["device"] if value["device"] != "meta" else "cpu")
    if isinstance(value, dict):
        return {_with_tensors(key, tensors): _with_tensors(each, tensors) for key, each in value["dict"]}
    return value
