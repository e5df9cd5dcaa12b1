# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sizes in the configs of a checkpoint, checked before a library builds and allocates what they say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .original import LIMITS, require
from .tensor_info import brief, load_json


MAX_CONFIG = 2**20  # bytes
MAX_LAYERS, MAX_SIZE, MAX_DEPTH = 512, 2**22, 8
CONFIGS = ("transformer/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


def check_components(name: str, folder: Path) -> None:
    """
    Refuse a checkpoint whose configs have sizes that no model has.

    Args:
        name (`str`): of the argument, for the message.
        folder (`Path`): in Diffusers format; configs that it does not have are not missed here.

    Raises:
        `ValueError`: a size is beyond its limit, or a config is unreadable.
    """
    for path in (folder / config for config in CONFIGS):
        if not path.is_file():
            continue
        require(
            path.stat().st_size <= MAX_CONFIG,
            name,
            f"a folder of configs of up to {MAX_CONFIG} bytes",
            f"{path} is larger",
        )
        try:
            config = load_json(path.read_text())
        except (EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"`{name}` must be a folder with readable configs, but {path} is not: {error}") from error
        require(isinstance(config, dict), name, "a folder of configs", f"{path} holds {brief(config)}")
        for key, size in list_sizes(config):
            limit = LIMITS.get(key, MAX_LAYERS if "layers" in key or "depth" in key else MAX_SIZE)
            require(abs(size) <= limit, name, f"of a `{key}` of at most {limit}", f"{path} has {brief(size)}")


def list_sizes(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every whole number of a config with its name, and the lengths of its lists."""
    if isinstance(value, int):
        yield key, value
    elif isinstance(value, list):
        yield key, len(value)
    if depth < MAX_DEPTH and isinstance(value, (list, dict)):
        for inner, each in value.items() if isinstance(value, dict) else ((key, each) for each in value):
            yield from list_sizes(each, str(inner), depth + 1)
