# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One video on several devices: Diffusers' Ulysses context parallelism (DeepSpeed-Ulysses, arXiv 2309.14509) with a
rolling cache.

Diffusers splits the tokens of a pass over the processes. Around self-attention, tokens are exchanged for heads: each
process rotates, holds and attends to all tokens of some heads, so that its cache is 1 / degree of the whole.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import SeqAllToAllDim

from ..tokentrim_checks import check
from ..tokentrim_views.layout import Layout
from .backbone import Limits


class HeadExchange:
    """Exchanges a process's tokens of all heads for all tokens of its heads, and back.

    Args:
        parallel_config (`ParallelConfig`, *optional*):
            of a Diffusers attention processor; `None`: there is one process.
    """

    def __init__(self, parallel_config: Any = None):
        config = getattr(parallel_config, "context_parallel_config", None)
        self.group = None if config is None else config._ulysses_mesh.get_group()

    def split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(rows, seq / degree, heads, head_dim) -> (rows, seq, heads / degree, head_dim)"""
        return hidden_states if self.group is None else SeqAllToAllDim.apply(self.group, hidden_states, 2, 1)

    def split_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(rows, seq, heads / degree, head_dim) -> (rows, seq / degree, heads, head_dim)"""
        return hidden_states if self.group is None else SeqAllToAllDim.apply(self.group, hidden_states, 1, 2)


def context_parallel(transformer: Any) -> Any:
    """The `ContextParallelConfig` that `enable_parallelism` has set on a transformer, or `None`."""
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def check_saved_whole(transformer: Any, name: str, folder: Any) -> None:
    """Refuse to save a run of several processes, each of which holds a part of the context."""
    valid = "None under context parallelism, where each process only holds the context of its heads"
    check(folder is None or context_parallel(transformer) is None, name, folder, valid)


def check_parallel(
    transformer: ModelMixin,
    limits: Limits,
    layout: Layout,
    hooks: Sequence,
    generator: Any,
    chunk_tokens: Iterable[int],
) -> None:
    """
    Refuse what context parallelism cannot run. Nothing is checked for a transformer without `enable_parallelism`.

    Args:
        transformer (`ModelMixin`): the transformer of the call.
        limits ([`Limits`]): those of its backbone.
        layout ([`Layout`]): the layout of the call.
        hooks (`Sequence`): hooks of the denoiser.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): the call's random numbers.
        chunk_tokens (`Iterable[int]`): tokens of each chunk.

    Raises:
        `ValueError`: the processes cannot share this call, or would compute different videos.
    """
    config = context_parallel(transformer)
    if config is None:
        return
    valid = "a WanTransformer3DModel under context parallelism"
    check(limits.parallel, "transformer", type(transformer).__name__, valid)
    ring, degree, heads = config.ring_degree, config.ulysses_degree, transformer.config.num_attention_heads
    valid = "1, with `ulysses_degree` instead: a ring passes on keys of a pass's own tokens, not those of the past"
    check(ring == 1, "ring_degree", ring, valid)
    check(heads % degree == 0, "ulysses_degree", degree, f"a divisor of the transformer's {heads} heads")
    for num_tokens in sorted(set(chunk_tokens)):
        valid = f"a divisor of the {num_tokens} tokens of a chunk"
        check(num_tokens % degree == 0, "ulysses_degree", degree, valid)
    rewrites = layout.before_chunk is not None or layout.before_commit is not None
    valid = (
        "one that rewrites no keys under `ulysses_degree`, and is the same for all heads, as each process sees its own"
    )
    check(not (rewrites or layout.by_head), "layout", type(layout).__name__, valid)
    names = [type(hook).__name__ for hook in hooks]
    valid = "one without guidance by gradients under `ulysses_degree`, as they end at a process's own tokens"
    check(not names, "method", names, valid)
    valid = "given under `ulysses_degree`, with the same seed on every process"
    check(generator is not None, "generator", None, valid)
