# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Attention that reads a rolling KV cache, and the context manager that installs it in a Wan transformer.

Queries and keys are normalized and rotated in fp32, and the sinusoid of the timestep is computed in float64, whatever
the model's dtype: rounding errors would be cached, read again and amplified.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import _get_qkv_projections

from ..tokentrim_kv.cache import RollingKVCache
from ..tokentrim_kv.reading import Reading
from .parallel import HeadExchange


MASKLESS = ("flash", "_flash", "aiter", "sage", "_sage", "_native_flash", "_native_xla")  # how their names begin


installing = threading.Lock()


NUM_EXTRA = 8  # channels: kernels ask for heads of a multiple of this


def takes_mask(backend: AttentionBackendName | str | None, mask: torch.Tensor) -> bool:
    """Whether an attention backend, the active one if `None`, takes a mask. Of the kernels of variable length, those
    from the Hub take boolean masks; the installed ones would read the first keys of a row instead of the masked
    ones."""
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    name = AttentionBackendName(backend).value
    return not name.startswith(MASKLESS) or (name.endswith("varlen_hub") and mask.dtype == torch.bool)


class CachedAttnProcessor:
    """What both processors share: the cache, the layer, and the attention backend of the stock processor."""

    in_rollout = True  # how another rollout, loaded anew, knows them

    def __init__(self, cache: RollingKVCache, layer: int, stock):
        self.cache = cache
        self.layer = cache.layer(layer)
        self._attention_backend = stock._attention_backend

    def attend(self, query, key, value, mask=None, groups=()) -> torch.Tensor:
        """(rows, queries, heads, head_dim); `groups`: the same as a boolean mask, see [`Reading`]."""
        query = query.to(value.dtype)
        if mask is None:
            return self._dispatch(query, key, value)
        if takes_mask(self._attention_backend, mask):
            return self._dispatch(query, key, value, mask.to(value.dtype) if mask.is_floating_point() else mask)
        if groups:
            return self._attend_by_length(query, key, value, groups)
        return self._attend_weighted(query, key, value, mask)

    def _attend_by_length(self, query, key, value, groups) -> torch.Tensor:
        """The same on a kernel without masks: rows that read equally many keys together, and no others of theirs."""
        outputs = [
            self._dispatch(query[rows], *(each[rows[:, None], columns] for each in (key, value)))
            for rows, columns in groups
        ]
        return torch.cat(outputs)[torch.cat([rows for rows, _ in groups]).argsort()]

    def _attend_weighted(self, query, key, value, mask) -> torch.Tensor:
        """The same with weights, exactly: sum w e^s v / sum w e^s, with the sum below as one more channel."""
        weights = (mask.exp() if mask.is_floating_point() else mask)[:, 0, 0, :, None, None].to(value.dtype)
        head_dim = query.shape[-1]
        query, key = (F.pad(hidden_states, (0, NUM_EXTRA)) for hidden_states in (query, key))
        value = F.pad(value, (0, NUM_EXTRA), value=1.0) * weights
        attended = self._dispatch(query, key, value, scale=head_dim**-0.5)
        return attended[..., :head_dim] / attended[..., head_dim : head_dim + 1]

    def _dispatch(self, query, key, value, mask=None, scale=None) -> torch.Tensor:
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            scale=scale,
            backend=self._attention_backend,
        )

    def project(self, attn, hidden_states: torch.Tensor) -> torch.Tensor:
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2, 3)))


class CachedSelfAttnProcessor(CachedAttnProcessor):
    """Self-attention of the current chunk to [held context, current chunk], unmasked but for padding."""

    def __init__(self, cache: RollingKVCache, layer: int, stock):
        super().__init__(cache, layer, stock)
        self.exchange = HeadExchange(stock._parallel_config)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, key, value = _get_qkv_projections(attn, hidden_states, None)
        query = attn.norm_q(query.float()).unflatten(2, (attn.heads, -1))  # (rows, seq, heads, head_dim)
        key = attn.norm_k(key.float()).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        query, key, value = map(self.exchange.split_heads, (query, key, value))
        if self.cache.reading is not None and self.cache.reading.parts:
            attended = self._attend_parts(query, key, value)
        else:
            keys, values, mask = self.cache.update(self.layer, key, value, query)
            attended = self._attend_chunks(self.cache.rotate_queries(query), keys, values, mask, self.cache.reading)
        return self.project(attn, self.exchange.split_tokens(attended))

    def _attend_chunks(self, query, key, value, mask, reading: Reading) -> torch.Tensor:
        """Attention to all keys; of a pass in which chunks do not read those after them, chunk by chunk."""
        if len(reading.segments) < 2:
            return self.attend(query, key, value, mask, reading.groups)
        outputs, num_keys = [], key.shape[1] - query.shape[1]
        for chunk_query in query.split(reading.segments, dim=1):
            num_keys += chunk_query.shape[1]
            seen = None if mask is None else mask[..., :num_keys]
            groups = [
                (rows, columns[:, : columns.shape[1] - key.shape[1] + num_keys]) for rows, columns in reading.groups
            ]
            outputs.append(self.attend(chunk_query, key[:, :num_keys], value[:, :num_keys], seen, groups))
        return torch.cat(outputs, dim=1)

    def _attend_parts(self, query, key, value) -> torch.Tensor:
        """Attention where queries or heads read different frames, one call for each part."""
        attended = torch.empty_like(value)
        for part, *tensors in self.cache.update_parts(self.layer, key, value, query):
            output = self.attend(*tensors, part.mask, part.groups)
            if part.heads is None:
                attended[:, part.tokens] = output
            else:
                attended[:, part.tokens[:, None], part.heads[self.layer.index]] = output
        return attended


class CachedCrossAttnProcessor(CachedAttnProcessor):
    """Cross-attention to a prompt whose keys and values are projected once."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        def project():
            _, key, value = _get_qkv_projections(attn, hidden_states[:, :0], encoder_hidden_states)
            key = attn.norm_k(key.float()).to(value.dtype)
            return key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))

        query = attn.to_q(hidden_states)
        query = attn.norm_q(query.float()).unflatten(2, (attn.heads, -1))
        return self.project(attn, self.attend(query, *self.layer.prompt_of(self.cache.rows, len(query), project)))


class ExactTimesteps(torch.nn.Module):
    """The sinusoid of Diffusers' `Timesteps`, computed in float64 as the original Wan code does."""

    def __init__(self, stock: Timesteps):
        super().__init__()
        self.stock = stock

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(N,) -> (N, num_channels), in fp32."""
        half, exact = self.stock.num_channels // 2, torch.float32 if timesteps.device.type == "mps" else torch.float64
        exponent = torch.arange(half, dtype=exact, device=timesteps.device) / (half - self.stock.downscale_freq_shift)
        angles = self.stock.scale * timesteps.to(exact)[:, None] * 10000.0**-exponent
        halves = (angles.cos(), angles.sin()) if self.stock.flip_sin_to_cos else (angles.sin(), angles.cos())
        return torch.cat(halves, dim=-1).float()


def check_free(transformer: ModelMixin) -> None:
    """Refuse a transformer that another rollout uses."""
    if any(getattr(block.attn1.processor, "in_rollout", False) for block in transformer.blocks):
        raise RuntimeError(
            "This transformer is in a rollout already: finish or close that stream first, or load a second pipeline."
        )


@contextmanager
def replaced_processors(transformer: ModelMixin, make_self: Callable, make_cross: Callable) -> Iterator[None]:
    """A context in which every block of `transformer` has the processors that `make_self` and `make_cross` return for
    a layer's index and its stock processor. The stock processors are always restored."""
    stock = []
    try:
        with installing:  # of two threads, one gets it
            check_free(transformer)
            stock = [(attn, attn.processor) for block in transformer.blocks for attn in (block.attn1, block.attn2)]
            for layer, block in enumerate(transformer.blocks):
                block.attn1.set_processor(make_self(layer, block.attn1.processor))
                block.attn2.set_processor(make_cross(layer, block.attn2.processor))
        yield
    finally:
        for attn, processor in stock:
            attn.set_processor(processor)


@contextmanager
def cached_attention(transformer: WanTransformer3DModel, cache: RollingKVCache) -> Iterator[None]:
    """A context in which every attention layer of `transformer` reads and writes `cache`."""
    make_self, make_cross = partial(CachedSelfAttnProcessor, cache), partial(CachedCrossAttnProcessor, cache)
    with replaced_processors(transformer, make_self, make_cross), warnings.catch_warnings():
        # The norm in fp32 of a model in bf16 is what we ask for, at the cost of torch's fused kernel.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        embedder = transformer.condition_embedder
        timesteps = embedder.timesteps_proj
        try:
            if isinstance(timesteps, Timesteps):
                embedder.timesteps_proj = ExactTimesteps(timesteps)
            yield
        finally:
            embedder.timesteps_proj = timesteps
