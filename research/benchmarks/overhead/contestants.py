# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The contestants: the floor, and rollouts of this project at a commit."""

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import _get_qkv_projections

from tokentrim.tokentrim_backbones.attention import replaced_processors
from tokentrim.tokentrim_policies.trim import SeverityMonitor
from tokentrim.tokentrim_views.rope import grid_places, rotary_angles, rotate


STEPS, CHUNK = 4, 3
PERIOD = 12  # chunks between two triggers: 8%


@dataclass(frozen=True)
class Size:
    """A random model and the size of its latents, `latent` (height, width), with patches of 1 x 2 x 2."""

    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    latent: tuple[int, int]
    text: tuple[int, int]  # tokens and channels of a prompt
    window: int = 21
    dtype: torch.dtype = torch.float32

    @property
    def grid(self) -> tuple[int, int]:
        return self.latent[0] // 2, self.latent[1] // 2

    def build(self, device: str) -> WanTransformer3DModel:
        torch.manual_seed(0)
        with torch.device(device):
            transformer = WanTransformer3DModel(
                num_attention_heads=self.heads,
                attention_head_dim=self.head_dim,
                text_dim=self.text[1],
                ffn_dim=self.ffn_dim,
                num_layers=self.layers,
            )
        return transformer.eval().requires_grad_(False).to(self.dtype)


SIZES = {
    "tiny": Size(4, 32, 512, 4, (16, 16), (16, 64)),
    "mid": Size(8, 64, 2048, 8, (16, 28), (64, 256)),
    "1.3b": Size(12, 128, 8960, 30, (60, 104), (512, 4096), dtype=torch.bfloat16),
}


class Floor:
    """The forwards of a plain rollout, chunk by chunk, against a preallocated context.

    Args:
        transformer (`WanTransformer3DModel`): uses other processors during the iteration.
        size ([`Size`]), window (`int`): size of the model, and latent frames that attention spans.
        latents (`torch.Tensor`), text (`torch.Tensor`): those of the rollout.
    """

    def __init__(self, transformer, size: Size, window: int, latents: torch.Tensor, text: torch.Tensor):
        self.transformer, self.latents, self.text = transformer, latents.to(size.dtype), text.to(size.dtype)
        self.num_tokens = size.grid[0] * size.grid[1]
        self.window = window
        shape = (len(latents), window * self.num_tokens, size.heads, size.head_dim)
        context = torch.zeros(size.layers, 2, *shape, dtype=size.dtype, device=latents.device)
        self.context = context.normal_() * 0.5
        self.held = 0
        rope_dims = (transformer.rope.t_dim, transformer.rope.h_dim, transformer.rope.w_dim)
        place = grid_places(size.grid).repeat(CHUNK, 1)[None]
        time_ = torch.arange(CHUNK).repeat_interleave(self.num_tokens)[None]
        self.angles = rotary_angles(time_, place, rope_dims, latents.device)

    def self_attention(self, layer: int, stock) -> Callable:
        def processor(attn, hidden_states, *_, **__):
            query, key, value = _get_qkv_projections(attn, hidden_states, None)
            query = attn.norm_q(query.float()).unflatten(2, (attn.heads, -1))
            key = attn.norm_k(key.float()).unflatten(2, (attn.heads, -1))
            num_keys = self.held + key.shape[1]
            keys, values = self.context[layer, :, :, :num_keys]
            keys[:, self.held :] = rotate(key, *self.angles)
            values[:, self.held :] = value.unflatten(2, (attn.heads, -1))
            return self.attend(attn, rotate(query, *self.angles).to(value.dtype), keys, values)

        return processor

    def cross_attention(self, layer: int, stock) -> Callable:
        prompt = []

        def processor(attn, hidden_states, encoder_hidden_states, *_, **__):
            if not prompt:
                _, key, value = _get_qkv_projections(attn, hidden_states[:, :0], encoder_hidden_states)
                key = attn.norm_k(key.float()).to(value.dtype)
                prompt.extend(x.unflatten(2, (attn.heads, -1)) for x in (key, value))
            query = attn.norm_q(attn.to_q(hidden_states).float()).unflatten(2, (attn.heads, -1))
            return self.attend(attn, query.to(prompt[1].dtype), *prompt)

        return processor

    def attend(self, attn, query, key, value) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(*heads_first)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2, 3))

    @torch.no_grad()
    def __iter__(self) -> Iterator[None]:
        chunks = self.latents.split(CHUNK, dim=2)
        times = torch.tensor([1000.0, 750.0, 500.0, 250.0, 0.0], device=self.latents.device)
        with replaced_processors(self.transformer, self.self_attention, self.cross_attention):
            for index, chunk in enumerate(chunks):
                self.held = min(index * CHUNK, self.window - CHUNK) * self.num_tokens
                for step in range(STEPS + (index + 1 < len(chunks))):
                    self.transformer(chunk, times[step].expand(len(chunk)), self.text, return_dict=False)
                yield


def rollout(
    package: Any,
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    text: torch.Tensor,
    between: Callable = lambda stream: None,
    vae: AutoencoderKLWan | None = None,
    **call,
) -> Iterator[None]:
    """A stream of `package`, this project's code at a commit; `between` is called between two chunks."""
    scheduler = package.TokenTrimFlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = package.TokenTrimPipeline(None, None, transformer, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": STEPS, "output_type": "latent", "num_frames_per_chunk": CHUNK, **call}
    with pipe.stream(latents=latents, prompt_embeds=text, **call) as stream:
        for _ in stream:
            between(stream)
            yield


class EveryTwelfth(SeverityMonitor):
    """Measures as the gate does, and trims one chunk of each `PERIOD`, whatever it measured."""

    num_chunks = 0

    def is_abnormal(self, measured: float) -> bool:
        return self.num_chunks % PERIOD == PERIOD // 2 and "regenerated_severity" not in self.facts

    def commit(self, chunk: torch.Tensor) -> torch.Tensor:
        self.num_chunks += 1
        return super().commit(chunk)


def small_vae() -> AutoencoderKLWan:
    """A random VAE of Wan's shape, narrower."""
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=16, z_dim=16).eval().requires_grad_(False)


def load_checkout(folder: Path):
    """This project from another checkout."""
    spec = importlib.util.spec_from_file_location(
        "before", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = sys.modules["before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def shared(transformer):
    """Another module with the same weights, because a rollout owns its transformer."""
    return copy.deepcopy(transformer, {id(each): each for each in (*transformer.parameters(), *transformer.buffers())})
