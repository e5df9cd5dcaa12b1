# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim for Diffusers: long video that does not fall apart."""

import importlib


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
}
__all__ = list(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
