# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What Diffusers reads where `custom_pipeline` is this directory or a Hub repository: all files, named one by one."""

from .pipeline_tokentrim import TokenTrimPipeline
from .tokentrim_backbones.attention import check_free
from .tokentrim_backbones.far import FARBackbone
from .tokentrim_backbones.hooks import check_hooks
from .tokentrim_backbones.parallel import check_parallel
from .tokentrim_backbones.wan import rotary_dims
from .tokentrim_checks import check
from .tokentrim_files.bundle import bundle
from .tokentrim_files.checkpoint import check_portable
from .tokentrim_files.run_state import load_state
from .tokentrim_frames.decode import make_decoder
from .tokentrim_frames.mp4 import VideoWriter
from .tokentrim_frames.output import TokenTrimPipelineOutput
from .tokentrim_kv.book import take_tokens
from .tokentrim_kv.cache import RollingKVCache
from .tokentrim_kv.rewriting import LayerContext
from .tokentrim_kv.store import LayerStore
from .tokentrim_policies.chain import plain_state
from .tokentrim_policies.flowmo import FlowMo
from .tokentrim_policies.matching import MatchMean
from .tokentrim_policies.outliers import quantiles
from .tokentrim_policies.policy import ContextPolicy
from .tokentrim_policies.quarantine import Quarantine
from .tokentrim_policies.reanchor import Reanchor
from .tokentrim_policies.registry import DEFAULT_METHOD, make_method
from .tokentrim_policies.stability import token_grid
from .tokentrim_policies.trim import TokenTrim
from .tokentrim_scheduler import lift_scheduler
from .tokentrim_session.denoise import Prompt
from .tokentrim_session.encode import encode_prompts
from .tokentrim_session.given import read_video
from .tokentrim_session.noise import Noise
from .tokentrim_session.partition import partition_chunks
from .tokentrim_session.plan import plan_rollout
from .tokentrim_session.prompts import PromptChange
from .tokentrim_session.run import Rollout
from .tokentrim_session.stream import Stream
from .tokentrim_views.averages import MemRoPE
from .tokentrim_views.deep_sink import DeepSink
from .tokentrim_views.layout import Layout
from .tokentrim_views.memory import Memory
from .tokentrim_views.registry import make_layout
from .tokentrim_views.rope import rotate
from .tokentrim_views.tether import Tether
from .tokentrim_views.windows import InfinityRope
