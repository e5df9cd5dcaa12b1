# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A Wan transformer and its past, as a rollout sees them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from ..tokentrim_kv.cache import RollingKVCache
from ..tokentrim_views.layout import Pass
from .attention import cached_attention


def rotary_dims(transformer: WanTransformer3DModel) -> tuple[int, int, int]:
    """How a head's rotary dimensions are shared among (frame, height, width)."""
    return transformer.rope.t_dim, transformer.rope.h_dim, transformer.rope.w_dim


class WanBackbone:
    """A Wan transformer and its cache as a rollout sees them: the flow of the chunks in flight, and a past that grows by
    chunks.

    Args:
        transformer (`WanTransformer3DModel`): stays as it is but inside `attached`.
        grid (`tuple[int, int]`), **context: what [`RollingKVCache`] takes.
    """

    def __init__(self, transformer: WanTransformer3DModel, grid: tuple[int, int], **context):
        self.transformer = transformer
        self.cache = RollingKVCache(grid, rotary_dims(transformer), **context)
        self.context: dict[int, torch.Tensor] = {}  # clean latents of each held frame, (B, C, 1, H, W)

    def attached(self) -> AbstractContextManager:
        """The transformer reads and writes the cache inside."""
        return cached_attention(self.transformer, self.cache)

    def make_room(self, num_frames: int) -> None:
        """Before a chunk of `num_frames` latent frames: what the layout does not keep leaves."""
        self.cache.make_room(num_frames)
        self.context = {frame: self.context[frame] for frame in self.cache.frames}

    def evict(
        self, tokens: Mapping[int, Iterable[int]], since_frame: int = 0, weight: float = 0.0
    ) -> dict[int, list[int]]:
        """Hard pruning (eq. 9, 10), or soft pruning to a weight, as in [`RollingKVCache`]."""
        return self.cache.evict(tokens, since_frame, weight)

    def predict_flow(
        self,
        latents: torch.Tensor,
        chunk_sizes: Sequence[int],
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor,
        text: torch.Tensor,
        attention_kwargs: dict[str, Any] | None,
        pass_: Pass = Pass(),
    ) -> torch.Tensor:
        """Flow of the chunks in flight behind the cached past.

        Args:
            latents (`torch.Tensor`): the chunks, (rows, C, T, H, W).
            chunk_sizes (`Sequence[int]`): latent frames of each.
            timesteps (`torch.Tensor`), next_timesteps (`torch.Tensor`): of each chunk, where it is and where it goes.
            text (`torch.Tensor`): text embeddings, (rows, text, dim).
            attention_kwargs (`dict`, *optional*): passed on to the transformer.
            pass_ ([`Pass`]): which pass this is, for the layout.

        Returns:
            `torch.Tensor`: flow prediction, shaped like `latents`.
        """
        self.cache.begin_pass(latents.shape[2], pass_)
        timestep = timesteps.float()
        if len(chunk_sizes) > 1:  # one for each token, frame-major
            num_tokens = [size * self.cache.tokens_per_frame for size in chunk_sizes]
            timestep = torch.cat([time.expand(num) for time, num in zip(timestep, num_tokens)])[None]
        return self._forward(latents, timestep, text, attention_kwargs)

    def _forward(self, latents, timestep, text, attention_kwargs) -> torch.Tensor:
        self.cache.prepare(len(latents), latents.device)
        return self.transformer(
            hidden_states=latents.to(self.transformer.dtype),
            timestep=timestep.expand(len(latents), *timestep.shape[1:]),
            encoder_hidden_states=text.to(self.transformer.dtype),
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]

    def commit(
        self, latents: torch.Tensor, text: torch.Tensor, attention_kwargs: dict[str, Any] | None
    ) -> torch.Tensor:
        """A forward over the clean chunk at timestep 0 writes its keys and values.

        Returns what is finite if the pass was.
        """
        frames = range(self.cache.next_frame, self.cache.next_frame + latents.shape[2])
        self.context.update(zip(frames, latents[: self.cache.num_videos].split(1, dim=2)))
        with self.cache.writing():
            clean, sizes = torch.zeros(1, device=latents.device, dtype=torch.float32), [latents.shape[2]]
            return self.predict_flow(latents, sizes, clean, clean, text, attention_kwargs, Pass("commit"))

    def recache(self, text: torch.Tensor, attention_kwargs: dict[str, Any] | None) -> None:
        """Encode the window again under another prompt, all its frames together, each seeing all (LongLive, arXiv
        2509.22622). What the layout leaves as it is, is read."""
        cache = self.cache
        stay, frames = cache.layout.recache(list(cache.frames))
        if not frames:
            return
        book = cache.book.of_same(frames, cache.tokens_per_frame)  # what was evicted stays so
        cache.retain(stay)
        cache.next_frame = frames[0]
        cache.begin_pass(len(frames), Pass("recache"), book)
        latents = torch.cat([self.context[frame] for frame in frames], dim=2)
        latents = latents.repeat(len(text) // len(latents), 1, 1, 1, 1)
        with cache.writing():
            clean = torch.zeros(1, device=latents.device, dtype=torch.float32)
            self._forward(latents, clean, text, attention_kwargs)

    def state_dict(self) -> dict:
        """The past between two chunks: plain values and tensors."""
        return {"cache": self.cache.state_dict(), "context": [[*each] for each in self.context.items()]}

    def load_state_dict(self, state: dict) -> None:
        self.cache.load_state_dict(state["cache"])
        self.context = dict(state["context"])
