# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What Diffusers reads where `custom_pipeline` is this directory or a Hub repository: all files, named one by one."""

from .pipeline_tokentrim import TokenTrimPipeline  # noqa: F401
from .tokentrim_anchor import Anchor  # noqa: F401
from .tokentrim_attention import WanBackbone  # noqa: F401
from .tokentrim_cache import RollingKVCache  # noqa: F401
from .tokentrim_far import FARBackbone  # noqa: F401
from .tokentrim_flowmo import guide  # noqa: F401
from .tokentrim_inputs import check  # noqa: F401
from .tokentrim_output import TokenTrimPipelineOutput  # noqa: F401
from .tokentrim_policy import TokenTrimPolicy  # noqa: F401
from .tokentrim_quarantine import Quarantine  # noqa: F401
from .tokentrim_saving import copy_code  # noqa: F401
from .tokentrim_scheduler import lift_scheduler  # noqa: F401
from .tokentrim_stability import token_grid  # noqa: F401
