# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim for Diffusers: long video that does not fall apart."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # the same names, for editors and type checkers
    from .pipeline_tokentrim import TokenTrimPipeline as TokenTrimPipeline
    from .tokentrim_frames.comparison import Comparison as Comparison
    from .tokentrim_frames.output import TokenTrimPipelineOutput as TokenTrimPipelineOutput
    from .tokentrim_kv.cache import RollingKVCache as RollingKVCache
    from .tokentrim_policies.flowmo import FlowMo as FlowMo
    from .tokentrim_policies.policy import ContextPolicy as ContextPolicy
    from .tokentrim_policies.quarantine import Quarantine as Quarantine
    from .tokentrim_policies.reanchor import Reanchor as Reanchor
    from .tokentrim_policies.registry import METHODS as METHODS
    from .tokentrim_policies.trim import TokenTrim as TokenTrim
    from .tokentrim_scheduler import TokenTrimFlowMapEulerDiscreteScheduler as TokenTrimFlowMapEulerDiscreteScheduler
    from .tokentrim_scheduler import (
        TokenTrimFlowMatchEulerDiscreteScheduler as TokenTrimFlowMatchEulerDiscreteScheduler,
    )
    from .tokentrim_scheduler import TokenTrimFlowMatchLCMScheduler as TokenTrimFlowMatchLCMScheduler
    from .tokentrim_scheduler import TokenTrimSchedulerMixin as TokenTrimSchedulerMixin
    from .tokentrim_scheduler import TokenTrimUniPCMultistepScheduler as TokenTrimUniPCMultistepScheduler
    from .tokentrim_scheduler import lift_scheduler as lift_scheduler
    from .tokentrim_views.layout import Layout as Layout
    from .tokentrim_views.layout import View as View
    from .tokentrim_views.layout import WindowLayout as WindowLayout
    from .tokentrim_views.registry import LAYOUTS as LAYOUTS

# Lazy: the same flat files also serve as a Diffusers custom pipeline, where importing the package must load nothing.
_EXPORTS = {
    "TokenTrimPipeline": "pipeline_tokentrim",
    "TokenTrimPipelineOutput": "tokentrim_frames.output",
    "Comparison": "tokentrim_frames.comparison",
    "ContextPolicy": "tokentrim_policies.policy",
    "TokenTrim": "tokentrim_policies.trim",
    "Quarantine": "tokentrim_policies.quarantine",
    "Reanchor": "tokentrim_policies.reanchor",
    "FlowMo": "tokentrim_policies.flowmo",
    "Layout": "tokentrim_views.layout",
    "View": "tokentrim_views.layout",
    "WindowLayout": "tokentrim_views.layout",
    "RollingKVCache": "tokentrim_kv.cache",
    "TokenTrimSchedulerMixin": "tokentrim_scheduler",
    "TokenTrimFlowMapEulerDiscreteScheduler": "tokentrim_scheduler",
    "TokenTrimFlowMatchEulerDiscreteScheduler": "tokentrim_scheduler",
    "TokenTrimFlowMatchLCMScheduler": "tokentrim_scheduler",
    "TokenTrimUniPCMultistepScheduler": "tokentrim_scheduler",
    "lift_scheduler": "tokentrim_scheduler",
    "METHODS": "tokentrim_policies.registry",
    "LAYOUTS": "tokentrim_views.registry",
}
__all__ = list(_EXPORTS)
__version__ = "0.2.0"


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
