# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Classes that load the parts of folders which other programs wrote, as the stock classes that they are.

Diffusers looks up the class of a part by module and name, and its base classes in the same module: `ModelMixin` and
`SchedulerMixin` have to be imported here.
"""

from typing import Any

from diffusers import FlowMatchLCMScheduler, ModelMixin, SchedulerMixin, WanTransformer3DModel

from .foreign import (
    CAUSAL_CLASS,
    FOREIGN_CONFIG,
    FOREIGN_FIELDS,
    FOREIGN_NAMES,
    ROLLING_CLASS,
    STOCK_CLASS,
    foreign_class,
    read_fields,
)


class ForeignTransformer(WanTransformer3DModel):
    """Loads a stock transformer that remembers its foreign class and fields in its config."""

    kind = STOCK_CLASS  # that the folder's index names

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> ModelMixin | tuple:
        named = config.get("_class_name")
        kind = named if cls.kind == STOCK_CLASS and named in FOREIGN_FIELDS else cls.kind
        fields = {"class": kind} if kind == STOCK_CLASS else read_fields(kind, config)
        stock = {name: value for name, value in config.items() if name not in FOREIGN_NAMES}
        loaded = WanTransformer3DModel.from_config({**stock, "_class_name": STOCK_CLASS}, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.register_to_config(**{FOREIGN_CONFIG: fields})
        return loaded


class CausalTransformer(ForeignTransformer):
    kind = CAUSAL_CLASS


class RollingTransformer(ForeignTransformer):
    kind = ROLLING_CLASS


class ForeignScheduler(FlowMatchLCMScheduler):
    """Loads the schedule of a causal folder. Its file is of the class that the other program uses, or of the base model's,
    which that program replaces: shift 5, and clean latents are re-noised."""

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> SchedulerMixin:
        config = FlowMatchLCMScheduler.load_config(folder)
        if config.get("_class_name") == FlowMatchLCMScheduler.__name__:
            return FlowMatchLCMScheduler.from_pretrained(folder, **kwargs)
        is_theirs = config.get("_class_name") == "SelfForcingFlowMatchScheduler"
        return FlowMatchLCMScheduler(shift=config.get("shift", 5.0) if is_theirs else 5.0)


FOREIGN_LOADERS = {STOCK_CLASS: ForeignTransformer, CAUSAL_CLASS: CausalTransformer, ROLLING_CLASS: RollingTransformer}


def name_loaders(index: dict[str, Any]) -> dict[str, Any]:
    """A folder's index, with loaders instead of classes that Diffusers does not have."""
    kind = foreign_class(index)
    if kind is None:
        return index
    loader = FOREIGN_LOADERS[kind]
    named: dict[str, Any] = {"transformer": [loader.__module__, loader.__name__]}
    if kind != STOCK_CLASS:
        named["_class_name"] = "WanPipeline"  # whose other entries Diffusers leaves out without a word
    if kind != STOCK_CLASS and index.get("scheduler"):
        named["scheduler"] = [ForeignScheduler.__module__, ForeignScheduler.__name__]
    return {**index, **named}
