# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What Diffusers reads where `custom_pipeline` is this directory or a Hub repository: all files, named one by one."""

from .pipeline_tokentrim import TokenTrimPipeline  # noqa: F401
from .tokentrim_attention import check_free  # noqa: F401
from .tokentrim_cache import RollingKVCache  # noqa: F401
from .tokentrim_checks import check  # noqa: F401
from .tokentrim_context import ContextPolicy  # noqa: F401
from .tokentrim_decoding import make_decoder  # noqa: F401
from .tokentrim_denoising import Prompt  # noqa: F401
from .tokentrim_encoding import encode_prompts  # noqa: F401
from .tokentrim_far import FARBackbone  # noqa: F401
from .tokentrim_field_layouts import InfinityRope  # noqa: F401
from .tokentrim_flowmo import FlowMo  # noqa: F401
from .tokentrim_given import read_video  # noqa: F401
from .tokentrim_hooks import check_hooks  # noqa: F401
from .tokentrim_layout import Layout  # noqa: F401
from .tokentrim_layouts import make_layout  # noqa: F401
from .tokentrim_memory import Memory  # noqa: F401
from .tokentrim_memory_layouts import MemRoPE  # noqa: F401
from .tokentrim_methods import make_method  # noqa: F401
from .tokentrim_output import TokenTrimPipelineOutput  # noqa: F401
from .tokentrim_parallel import check_parallel  # noqa: F401
from .tokentrim_partition import partition_chunks  # noqa: F401
from .tokentrim_plan import plan_rollout  # noqa: F401
from .tokentrim_policy import TokenTrim  # noqa: F401
from .tokentrim_prompts import PromptChange  # noqa: F401
from .tokentrim_quarantine import Quarantine  # noqa: F401
from .tokentrim_reanchor import Reanchor  # noqa: F401
from .tokentrim_rollout import Rollout  # noqa: F401
from .tokentrim_saving import copy_code  # noqa: F401
from .tokentrim_scheduler import lift_scheduler  # noqa: F401
from .tokentrim_stability import token_grid  # noqa: F401
from .tokentrim_state import load_state  # noqa: F401
from .tokentrim_statistics import quantiles  # noqa: F401
from .tokentrim_storage import LayerStore  # noqa: F401
from .tokentrim_stream import Stream  # noqa: F401
from .tokentrim_video import VideoWriter  # noqa: F401
