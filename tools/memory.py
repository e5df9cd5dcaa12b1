# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Memory that a run takes, estimated from a checkpoint's headers before its weights are loaded."""

from pathlib import Path

from .checkpoints import count_parameters, read_json
from .names import INDEX


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
    index, config = read_json(folder / INDEX), read_json(folder / "transformer" / "config.json")
    settings = {**{name: value for name, value in index.items() if value is not None}, **settings}
    parameters = count_parameters(folder)
    largest = max(parameters.values(), default=0)
    held = {"none": sum(parameters.values()), "model": largest}.get(offload, OFFLOADED * largest)
    layout = settings.get("layout")
    window = (
        next(iter(layout.values())).get("window_size") if isinstance(layout, dict) else settings.get("window_size")
    )
    window = window if isinstance(window, int) else WINDOW
    patch = config.get("patch_size") or [1, 2, 2]
    vae = folder / "vae" / "config.json"
    spatial = read_json(vae).get("scale_factor_spatial", 8) if vae.is_file() else 8
    height, width = settings.get("height") or 480, settings.get("width") or 832
    tokens = window * (height // (spatial * patch[1])) * (width // (spatial * patch[2]))
    values = config["num_layers"] * config["num_attention_heads"] * config["attention_head_dim"]
    videos = settings.get("num_videos_per_prompt") or 1
    return int(held * SIZES[dtype]), 2 * values * tokens * videos * SIZES[dtype]


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
