# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Which backbone runs a transformer."""

from diffusers import AnyFlowFARTransformer3DModel, ModelMixin, WanTransformer3DModel
from diffusers.utils.torch_utils import is_compiled_module

from ..tokentrim_checks import check
from .backbone import Backbone
from .far import FARBackbone
from .wan import WanBackbone


BACKBONES = {WanTransformer3DModel: WanBackbone, AnyFlowFARTransformer3DModel: FARBackbone}


def backbone_of(transformer: ModelMixin) -> type[Backbone]:
    """
    The backbone that runs a transformer, compiled or not.

    Raises:
        `ValueError`: there is none.
    """
    original = transformer._orig_mod if is_compiled_module(transformer) else transformer
    backbone = next((backbone for model, backbone in BACKBONES.items() if isinstance(original, model)), None)
    names = " or ".join(f"a {model.__name__}" for model in BACKBONES)
    check(backbone is not None, "transformer", type(original).__name__, names)
    return backbone
