# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Attention that reads a rolling KV cache, and the context manager that puts it into a Wan transformer and out again.

Queries and keys are normalised and rotated in fp32, and the sinusoid of the timestep is computed in float64, whatever
the model's dtype: their rounding would be cached, read again and amplified.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import _get_qkv_projections

from .tokentrim_cache import RollingKVCache


class _CachedAttnProcessor:
    """What both processors share: the cache, the layer, and the attention backend of the processor they stand for."""

    def __init__(self, cache: RollingKVCache, layer: int, stock):
        self.cache = cache
        self.layer = layer
        self._attention_backend = stock._attention_backend
        self._parallel_config = stock._parallel_config

    def attend(self, attn, query, key, value, mask=None) -> torch.Tensor:
        hidden_states = dispatch_attention_fn(
            query.to(value.dtype),
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=None if attn.is_cross_attention else self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2, 3)))


class CachedSelfAttnProcessor(_CachedAttnProcessor):
    """Self-attention of the current chunk to [held context, current chunk], unmasked but for padding."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, key, value = _get_qkv_projections(attn, hidden_states, None)
        query = attn.norm_q(query.float()).unflatten(2, (attn.heads, -1))  # (rows, seq, heads, head_dim)
        key = attn.norm_k(key.float()).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        keys, values, mask = self.cache.update(self.layer, key, value)
        return self.attend(attn, self.cache.rotate_chunk(query), keys, values, mask)


class CachedCrossAttnProcessor(_CachedAttnProcessor):
    """Cross-attention to a prompt whose keys and values are projected once."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        def project():
            _, key, value = _get_qkv_projections(attn, hidden_states[:, :0], encoder_hidden_states)
            key = attn.norm_k(key.float()).to(value.dtype)
            return key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))

        query = attn.to_q(hidden_states)
        query = attn.norm_q(query.float()).unflatten(2, (attn.heads, -1))
        return self.attend(attn, query, *self.cache.prompt(self.layer, project))


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


@contextmanager
def cached_attention(transformer: WanTransformer3DModel, cache: RollingKVCache) -> Iterator[None]:
    """Let every attention layer of `transformer` read and write `cache`; always puts its own parts back."""
    stock = [(attn, attn.processor) for block in transformer.blocks for attn in (block.attn1, block.attn2)]
    embedder = transformer.condition_embedder
    timesteps = embedder.timesteps_proj
    try:
        embedder.timesteps_proj = ExactTimesteps(timesteps)
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(CachedSelfAttnProcessor(cache, layer, block.attn1.processor))
            block.attn2.set_processor(CachedCrossAttnProcessor(cache, layer, block.attn2.processor))
        with warnings.catch_warnings():
            # The norm in fp32 of a model in bf16 is what we ask for, at the cost of torch's fused kernel.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
    finally:
        for attn, processor in stock:
            attn.set_processor(processor)
        embedder.timesteps_proj = timesteps


def rotary_dims(transformer: WanTransformer3DModel) -> tuple[int, int, int]:
    """How a head's rotary dimensions are shared among (frame, height, width)."""
    return transformer.rope.t_dim, transformer.rope.h_dim, transformer.rope.w_dim
