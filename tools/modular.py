# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command `tokentrim modular`: a folder that `ModularPipeline.from_pretrained` of Diffusers loads."""

import json
from pathlib import Path
from typing import Any

from diffusers import FlowMatchLCMScheduler, SchedulerMixin, __version__

from ..tokentrim_files.bundle import bundle
from ..tokentrim_files.checkpoint import INDEX, SETTINGS
from ..tokentrim_files.foreign import FOREIGN_FIELDS, STOCK_CLASS, foreign_class
from ..tokentrim_files.loaders import ForeignScheduler
from .checkpoints import check_code, check_parts, find_checkpoint, find_index, read_json, read_rollout
from .folders import new_folder


BLOCK = Path(__file__).parent / "modular_block.py"
PIPELINE_CLASS, BLOCKS_CLASS = "WanModularPipeline", "TokenTrimBlocks"
LOADED = ("tokenizer", "text_encoder", "transformer", "vae")  # from the checkpoint, wherever it lies


def write_modular(out: Path, checkpoint: str) -> None:
    """
    Write the code of the blocks, where their components are, the settings of the rollout, and the schedule.

    Args:
        out (`Path`): the folder to write, new or empty.
        checkpoint (`str`): a folder or a Hub id in Diffusers format. Weights stay there.

    Raises:
        `ValueError`: the checkpoint is not one of a causal model in Diffusers format, or it needs code of its own.
    """
    folder = find_checkpoint(checkpoint)
    if folder is None:
        index = read_json(find_index(checkpoint))
        foreign = foreign_class(index)
        if foreign is not None:
            raise ValueError(
                f"`checkpoint` must be a local copy for a {foreign} of another program: {checkpoint} is not."
            )
    else:
        check_code(folder, trust_remote_code=False)
        check_parts(folder)
        index, foreign = read_rollout(folder), foreign_class(read_json(folder / INDEX))
    if foreign == STOCK_CLASS and not any(index.get(name) for name in SETTINGS):
        raise ValueError(
            f"`checkpoint` must be that of a causal model, but {checkpoint} is a folder of a Wan pipeline."
        )
    where = checkpoint if folder is None else str(folder.resolve())
    with new_folder(out) as unfinished:
        (unfinished / "block.py").write_text(bundle(BLOCK))
        blocks = {"_class_name": BLOCKS_CLASS, "auto_map": {"ModularPipelineBlocks": f"block.{BLOCKS_CLASS}"}}
        write_json(unfinished / "modular_config.json", {**blocks, "_diffusers_version": __version__})
        parts = {name: describe_part(where, name, named_class(index, name)) for name in LOADED if index.get(name)}
        if folder is None:
            parts["scheduler"] = describe_part(where, "scheduler", index["scheduler"])
        else:
            scheduler = load_scheduler(folder, index, foreign)
            scheduler.save_pretrained(unfinished / "scheduler")
            parts["scheduler"] = describe_part(
                str(out.resolve()), "scheduler", ["diffusers", type(scheduler).__name__]
            )
        settings = {name: index[name] for name in SETTINGS if index.get(name) is not None}
        named = {"_class_name": PIPELINE_CLASS, "_blocks_class_name": BLOCKS_CLASS, "_diffusers_version": __version__}
        write_json(unfinished / "modular_model_index.json", {**named, **parts, **settings})


def named_class(index: dict[str, Any], name: str) -> list[str]:
    """Library and class of a part that stock Diffusers loads."""
    library, kind = index[name]
    return ["diffusers", STOCK_CLASS] if kind in FOREIGN_FIELDS else [library, kind]


def load_scheduler(folder: Path, index: dict[str, Any], foreign: str | None) -> SchedulerMixin:
    """The schedule of a checkpoint, as our pipeline loads it."""
    import diffusers

    if foreign in FOREIGN_FIELDS:
        return ForeignScheduler.from_pretrained(folder / "scheduler")
    kind = getattr(diffusers, index["scheduler"][1], FlowMatchLCMScheduler)
    return kind.from_pretrained(folder / "scheduler")


def describe_part(where: str, name: str, kind: list[str]) -> list[Any]:
    """A component in a modular index: not loaded, and from where it will be."""
    spec = {"pretrained_model_name_or_path": where, "subfolder": name, "variant": None, "revision": None}
    return [None, None, {**spec, "type_hint": kind}]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
