# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What users set on a transformer: hooks, some of which no rollout can run with, and adapters."""

from diffusers import ModelMixin

from ..tokentrim_checks import check


HARMLESS = ("PeftInputAutocastDisableHook",)  # takes the place of a forward and calls it


def check_hooks(transformer: ModelMixin) -> None:
    """
    Refuse what may skip a part of the transformer's forward: FirstBlockCache, MagCache, Pyramid Attention Broadcast,
    FasterCache, TaylorSeer, SeaCache, TextKVCache, skipped layers. Each answers a forward with what an earlier one
    left, while the pass that writes the context needs every layer's own keys and values.

    Args:
        transformer (`ModelMixin`): with or without hooks of `diffusers.hooks`.

    Raises:
        `ValueError`: there is such a hook; its name is in the message.
    """
    name = type(transformer._cache_config).__name__ if getattr(transformer, "is_cache_enabled", False) else None
    for module in () if name else transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hooks = {} if registry is None else registry.hooks
        names = [type(hook).__name__ for hook in hooks.values() if hasattr(hook, "new_forward") or hook._is_stateful]
        name = next((each for each in names if each not in HARMLESS), name)
    valid = (
        "without hooks that may skip a part of the forward, as the pass that writes the context needs all of it: call "
        "`pipe.transformer.disable_cache()`, or take the hook off"
    )
    check(name is None, "transformer", name, valid)


def adapters(transformer: ModelMixin) -> list[tuple]:
    """Which adapters (LoRA) of `peft` a transformer has, and how strong they are: equal where nothing has changed."""
    layers = [module for module in transformer.modules() if hasattr(module, "lora_A")]
    return [(id(each), str(each.scaling), str(each.active_adapters), each.disable_adapters) for each in layers]
