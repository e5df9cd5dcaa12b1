# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`check` and its typed forms: `TypeError` or `ValueError` naming an argument, its value and what is valid.

A leaf. Each room checks its own settings with them; a check never acts.
"""

import math
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Rational
from typing import Any

import numpy as np
import torch


LINE = 100  # characters of a value in a message

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = LINE


def check(ok: bool, name: str, value: Any, valid: str, error: type[Exception] = ValueError) -> None:
    """Raise `error` unless `ok`."""
    if not ok:
        raise error(f"`{name}` must be {valid}, but is {shown(value)}.")


def shown(value: Any) -> str:
    """A value in a message: the shape of a tensor or an array, and of others no more than a line."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"of shape {tuple(value.shape)}"
    text = " ".join(_brief.repr(value).split())
    return text if len(text) <= LINE else f"{text[: LINE - 3]}..."


def plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, fractions as floats, and tensors without their graph, also in dicts, lists and
    tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Rational) and not isinstance(value, Integral):
        return float(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if type(value) is dict:
        return {plain(key): plain(each) for key, each in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def check_int(name: str, value: Any, minimum: int, other: str = "", maximum: int | None = None) -> None:
    """An int; `other` says what else is valid."""
    valid = f"an int >= {minimum}{other}" if maximum is None else f"an int from {minimum} to {maximum}{other}"
    check(isinstance(value, Integral) and not isinstance(value, bool), name, value, valid, TypeError)
    check(minimum <= value and (maximum is None or value <= maximum), name, value, valid)


def check_number(name: str, value: Any, ok: Callable[[float], bool], valid: str) -> None:
    check(
        isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool),
        name,
        value,
        valid,
        TypeError,
    )
    check(math.isfinite(value) and ok(value), name, value, valid)


def check_bool(name: str, value: Any) -> None:
    check(isinstance(value, bool), name, value, "True or False", TypeError)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    check(isinstance(value, str), name, value, f"one of {list(choices)}", TypeError)
    check(value in choices, name, value, f"one of {list(choices)}")


def check_list(name: str, value: Any, of_type: type | tuple[type, ...], valid: str) -> None:
    of_types = isinstance(value, (list, tuple)) and all(isinstance(each, of_type) for each in value)
    check(of_types, name, value, valid, TypeError)


def check_callables(**arguments: Any) -> None:
    for name, value in arguments.items():
        check(value is None or callable(value), name, value, "callable or None", TypeError)


def check_tensor(name: str, value: Any, ndim: int, layout: str) -> None:
    """A floating-point tensor of `ndim` dimensions without NaN or Inf."""
    check(isinstance(value, torch.Tensor), name, value, f"a tensor {layout}", TypeError)
    check(value.is_floating_point(), name, value.dtype, f"a floating-point tensor {layout}", TypeError)
    check(value.ndim == ndim, name, value, f"a tensor {layout}")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` must be finite, but holds NaN or Inf.")


def check_settings(name: str, settings: Any, known: Sequence[str]) -> None:
    """A dict of settings, all of them known."""
    valid = f"a dict of settings among {list(known)}"
    check(isinstance(settings, dict), name, settings, valid, TypeError)
    check(set(settings) <= set(known), name, settings, valid)


def check_saved(name: str, value: Any, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> None:
    """A tensor of a saved run, of this shape (`None` stands for any size) and of this dtype (`None`: floating-point)."""
    same_call = f"of a run of the same call, with {name}"
    sizes = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    fits = isinstance(value, torch.Tensor) and len(value.shape) == len(shape)
    fits = fits and all(wanted in (None, size) for wanted, size in zip(shape, value.shape))
    check(fits, "state", value, f"{same_call} of shape {sizes}")
    known = value.is_floating_point() if dtype is None else value.dtype == dtype
    check(known, "state", value.dtype, f"{same_call} of {dtype or 'floating-point numbers'}")


def check_saved_frames(name: str, frames: Any, end: int) -> None:
    """Ascending latent frames of a saved run, all before `end`."""
    whole = isinstance(frames, list) and all(type(frame) is int and 0 <= frame < end for frame in frames)
    ascending = whole and all(before < after for before, after in zip(frames, frames[1:]))
    check(ascending, "state", frames, f"of a run of the same call, with {name} that ascend and are below {end}")
