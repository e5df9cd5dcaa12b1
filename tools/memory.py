# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Memory that a run takes, estimated from a checkpoint's headers before its weights are loaded."""

from pathlib import Path
from typing import Any

from .checkpoints import count_parameters, read_geometry, read_rollout


GIB = 2**30
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
WINDOW = 21  # latent frames, where a checkpoint says nothing
OFFLOADED = 1 / 20  # of the largest part, that sequential and group offload keep on the device


def estimate_memory(folder: Path, settings: dict, dtype: str, offload: str = "none") -> tuple[int, int]:
    """
    Bytes of weights and of the cache that are on the device at once, of one video; activations come on top.

    Args:
        folder (`Path`): the checkpoint.
        settings (`dict`): arguments of the call.
        dtype (`str`): of the weights, as PyTorch names it.
        offload (`str`): `"none"`, `"model"`, `"sequential"` or `"group"`.
    """
    index, geometry = read_rollout(folder), read_geometry(folder)
    settings = {**{name: value for name, value in index.items() if value is not None}, **settings}
    parameters = count_parameters(folder)
    largest = max(parameters.values(), default=0)
    held = {"none": sum(parameters.values()), "model": largest}.get(offload, OFFLOADED * largest)
    layout = settings.get("layout")
    named = next(iter(layout.values()), None) if isinstance(layout, dict) else None
    window = as_size(named.get("window_size") if isinstance(named, dict) else settings.get("window_size"), WINDOW)
    rows = as_size(settings.get("height"), 480) // geometry.rows
    columns = as_size(settings.get("width"), 832) // geometry.columns
    cached = geometry.values * window * rows * columns * as_size(settings.get("num_videos_per_prompt"), 1)
    return int(held * SIZES[dtype]), 2 * cached * SIZES[dtype]


def as_size(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default


def describe_shortage(weights: int, cache: int, free: int, device: str, offload: str, dtype: str) -> str | None:
    """A sentence where a run will hardly fit, with what helps; `None` where it will."""
    if weights + cache <= free:
        return None
    helps = ["--dtype bfloat16"] if dtype == "float32" else []
    if device != "cpu" and offload in ("none", "model"):
        helps.append("--offload " + {"none": "model", "model": "group"}[offload])
    helps.append("a smaller --height and --width")
    return (
        f"This will hardly fit: about {(weights + cache) / GIB:.1f} GiB are needed (weights {weights / GIB:.1f}, cache"
        f" {cache / GIB:.1f}, activations on top), and {free / GIB:.1f} GiB are free on {device}. What helps:"
        f" {' or '.join(helps)}."
    )
