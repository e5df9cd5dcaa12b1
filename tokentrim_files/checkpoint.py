# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a saved checkpoint says of its rollout, and of its classes: Diffusers' own names, or ours where the code lies
beside the weights."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffusers import AnyFlowFARPipeline, SchedulerMixin

from ..tokentrim_checks import check, check_number
from ..tokentrim_writing import check_target, write_whole
from .bundle import bundle, is_bundle
from .foreign import FOREIGN_CONFIG, STOCK_CLASS, rollout_settings
from .loaders import name_loaders


INDEX, PIPELINE, PIPELINE_FILE = "model_index.json", "TokenTrimPipeline", "pipeline_tokentrim.py"
# Arguments of the call that default to what travels with a checkpoint.
SCHEDULE_SETTINGS = ("num_inference_steps", "height", "width", "max_sequence_length")
ROLLOUT_SETTINGS = (
    "rollout",
    "num_frames_per_chunk",
    "window_size",
    "num_sink_frames",
    "relative_positions",
    "context_noise",
)
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


class CheckpointMixin:
    """Saves a pipeline as a checkpoint that loads with this project's code, and with Diffusers alone."""

    scheduler: SchedulerMixin | None
    _code: Path  # the file of the pipeline

    if TYPE_CHECKING:  # Diffusers has no types

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self: ...

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As in Diffusers, but without the file of code that a checkpoint names: this class is the code."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(index.get("_class_name"), (list, tuple)):
            index["_class_name"] = cls.__name__
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in Diffusers, but folders that other programs wrote name classes that exist."""
        return super().extract_init_dict(name_loaders(config_dict), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, include_code: bool = False, **kwargs) -> None:
        """
        Save all components, and the settings of the rollout.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            include_code (`bool`, defaults to `False`):
                Whether to save the pipeline's code as well, as one file. The folder then loads with
                `trust_remote_code=True` where this project is not installed, also from the Hub. A folder that holds the
                code already keeps it.
            args, kwargs (*optional*): as in [`DiffusionPipeline.save_pretrained`].
        """
        if include_code:
            write_code(save_directory, self._code)
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Write `model_index.json`. If the folder does not hold the pipeline's code, it names the stock Diffusers classes.

        Args:
            save_directory (`str` or `os.PathLike`): the checkpoint's folder.
        """
        super().save_config(save_directory, **kwargs)
        name_classes(save_directory, self.scheduler)


def complete_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    The settings of a pipeline: those among its arguments, else those that its transformer came with, from a folder that another
    program wrote.

    Raises:
        `TypeError`, `ValueError`: a setting is invalid, or the transformer is that of a bidirectional model.
    """
    settings, config = {name: arguments[name] for name in SETTINGS}, getattr(arguments["transformer"], "config", {})
    check_portable(settings)
    foreign = config.get(FOREIGN_CONFIG)
    is_bidirectional = isinstance(foreign, dict) and foreign["class"] == STOCK_CLASS
    if is_bidirectional and all(settings[name] is None for name in (*ROLLOUT_SETTINGS, "layout")):
        raise ValueError(
            f"`transformer` must be that of a causal model, but is the {STOCK_CLASS} of a bidirectional Wan pipeline. Pass"
            " `transformer=`; or, where these weights are causal, their rollout, such as `rollout='self_forcing'`."
        )
    came = rollout_settings(config)
    return {name: came.get(name) if value is None else value for name, value in settings.items()}


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


def name_classes(folder: str | os.PathLike, scheduler: SchedulerMixin | None) -> None:
    """Name the classes in `model_index.json`: the pipeline's where the folder holds its code, stock Diffusers classes
    otherwise, since ours would load nowhere. The scheduler is always a stock one, which our pipeline lifts again."""
    has_code = (Path(folder) / PIPELINE_FILE).is_file()
    names: dict[str, Any] = {"_class_name": AnyFlowFARPipeline.__name__}
    if has_code:
        names["_class_name"] = [Path(PIPELINE_FILE).stem, PIPELINE]
    if scheduler is not None:
        stock = next(base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers."))
        names["scheduler"] = ["diffusers", stock.__name__]
    index = Path(folder) / INDEX
    write_whole(index, json.dumps({**json.loads(index.read_text()), **names}, indent=2, sort_keys=True) + "\n")
