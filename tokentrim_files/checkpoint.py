# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a saved checkpoint says of its rollout, and of its classes: Diffusers' own names, or ours where the code lies
beside the weights."""

import json
import os
from pathlib import Path
from typing import Any

from diffusers import AnyFlowFARPipeline, SchedulerMixin

from ..tokentrim_checks import check, check_number
from ..tokentrim_writing import check_target, write_whole
from .bundle import bundle, is_bundle


INDEX, PIPELINE, PIPELINE_FILE = "model_index.json", "TokenTrimPipeline", "pipeline_tokentrim.py"
# Arguments of the call that default to what travels with a checkpoint.
SCHEDULE_SETTINGS = ("num_inference_steps", "height", "width", "max_sequence_length")
ROLLOUT_SETTINGS = ("rollout", "num_frames_per_chunk", "window_size", "num_sink_frames", "relative_positions")
# The largest that are believed: a stranger's checkpoint says how much a call allocates.
SETTINGS_LIMITS = {
    "num_inference_steps": 1000,
    "height": 2**14,
    "width": 2**14,
    "max_sequence_length": 2**14,
    "num_frames_per_chunk": 2**10,
    "window_size": 2**16,
    "num_sink_frames": 2**16,
}
SETTINGS = (*ROLLOUT_SETTINGS, *SCHEDULE_SETTINGS, "method", "layout", "prompt_transition", "fps")


def check_portable(settings: dict[str, Any]) -> None:
    """Settings that travel with a checkpoint are what its `model_index.json` can hold; a list there is a component."""
    for name, value in settings.items():
        try:
            portable = not isinstance(value, (list, tuple)) and json.loads(json.dumps(value)) == value
        except TypeError:
            portable = False
        valid = "a name, a number or a dict of settings, to travel with a checkpoint; the call takes the others"
        check(portable, name, value, valid, TypeError)
        _check_limits(name, value)
    if settings.get("fps") is not None:
        check_number("fps", settings["fps"], lambda fps: 0.01 <= fps <= 1000, "a number from 0.01 to 1000")


def _check_limits(name: str, value: Any) -> None:
    """Refuse a setting, also inside of a layout's or a method's, that is beyond its limit."""
    if isinstance(value, dict):
        for key, each in value.items():
            _check_limits(key, each)
    elif name in SETTINGS_LIMITS and isinstance(value, (int, float)):
        largest = SETTINGS_LIMITS[name]
        check(value <= largest, name, value, f"at most {largest}, to travel with a checkpoint")


def write_code(folder: str | os.PathLike, pipeline: Path) -> None:
    """Write the pipeline's code as one file, under the name of its own, to where Diffusers' loader looks for it."""
    source = bundle(pipeline)
    os.makedirs(folder, exist_ok=True)
    path = Path(folder) / PIPELINE_FILE
    check_target("save_directory", path, is_ours=is_bundle, ours="one file of code that this project wrote")
    write_whole(path, source)


def name_stock_classes(folder: str | os.PathLike, scheduler: SchedulerMixin | None) -> None:
    """Diffusers would write names of ours, which load nowhere without the code; our pipeline lifts a stock scheduler."""
    names = {"_class_name": AnyFlowFARPipeline.__name__}
    if scheduler is not None:
        stock = next(base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers."))
        names["scheduler"] = ["diffusers", stock.__name__]
    _rename(folder, names)


def name_our_classes(folder: str | os.PathLike) -> None:
    """Name the pipeline's class in the file beside the weights; it lifts the stock scheduler."""
    _rename(folder, {"_class_name": [Path(PIPELINE_FILE).stem, PIPELINE]})


def _rename(folder: str | os.PathLike, names: dict) -> None:
    index = Path(folder) / INDEX
    write_whole(index, json.dumps({**json.loads(index.read_text()), **names}, indent=2, sort_keys=True) + "\n")
