# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""AnyFlow-FAR's context, encoded chunk by chunk: the last chunks in full, the older ones compressed, in larger patches.

The context is chunk-causal, so a compressed chunk never changes once it is written. What a new chunk asks for is one
pass over the chunk that it pushes out of the full part, which is compressed, and over the full ones behind it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AnyFlowFARTransformer3DModel

from .tokentrim_attention import CachedCrossAttnProcessor, CachedSelfAttnProcessor, replaced_processors
from .tokentrim_cache import RollingKVCache


KEY_BLOCK = 128  # upstream fills its queries, and with them the keys, up to a multiple of this


class FARKVCache(RollingKVCache):
    """Keys and values of the past, the last chunks in full and the older ones compressed.

    Grows by the compressed tokens of a chunk at each `writing` pass; with a window it holds at most `window_size`
    latent frames less the current chunk. Tokens have one numbering: those of the full grid, then those of the
    compressed one, which stand where the middle of their full tokens is.

    Args:
        grid (`tuple[int, int]`), rope_dims, num_videos, **context: as in [`RollingKVCache`].
        scale (`tuple[int, int]`): full tokens that a compressed one stands for, (height, width).
        full_chunk_limit (`int`): chunks in full resolution, the current one included.
        pad_keys (`bool`): whether the current chunk also attends to the zero keys that upstream adds.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        rope_dims: tuple[int, int, int],
        num_videos: int,
        scale: tuple[int, int],
        full_chunk_limit: int,
        pad_keys: bool = True,
        **context,
    ):
        self.full_chunk_limit = full_chunk_limit
        self.pad_keys = pad_keys
        rows, columns = (tokens // per_patch for tokens, per_patch in zip(grid, scale))  # of the compressed grid
        full = torch.arange(grid[0] * grid[1]).view(grid)[: rows * scale[0], : columns * scale[1]]
        patches = full.unflatten(1, (columns, scale[1])).unflatten(0, (rows, scale[0])).transpose(1, 2)
        self.stands_for = patches.flatten(2).flatten(0, 1)  # (compressed tokens, full tokens of each)
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
        self.places = torch.cat([places, places[self.stands_for].mean(dim=1)])  # row and column of every token
        super().__init__(grid, rope_dims, num_videos, **context)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.pass_sizes: list[int] = []  # tokens of each chunk of the pass at hand
        self._full_chunks: list[list[int]] = []  # latent frames of each chunk in full
        self._num_demoted_frames = 0  # first frames of the pass at hand, which are compressed
        # Full tokens that were evicted, of every frame of `frames` and of the pass: what a compressed one is judged by.
        self._evicted = torch.zeros(self.num_videos, 0, self.tokens_per_frame, dtype=torch.bool)

    def held_tokens(self, video: int = 0) -> list[tuple[int, int]]:
        """The (latent frame, grid index) of every full token that `video` can attend to, in attention's order."""
        return [(frame, token) for frame, token in super().held_tokens(video) if token < self.tokens_per_frame]

    def held_compressed_tokens(self, video: int = 0) -> list[tuple[int, int]]:
        """The (latent frame, index in the compressed grid) of every compressed token that `video` can attend to."""
        first = self.tokens_per_frame
        return [(frame, token - first) for frame, token in super().held_tokens(video) if token >= first]

    def begin_chunk(self, num_frames: int) -> None:
        """Make room for a chunk of `num_frames` latent frames: what no pass will read any more leaves, but the sink."""
        before = self.frames
        super().begin_chunk(num_frames)
        left = set(self.frames)
        self._evicted = self._evicted[:, [frame in left for frame in before]]

    def begin_pass(self, num_frames: int) -> None:
        """The next forwards carry the `num_frames` latent frames of the chunk after the context."""
        self.pass_sizes, self._num_demoted_frames = [num_frames * self.tokens_per_frame], 0
        super().begin_pass(num_frames)

    def evict(self, tokens: Mapping[int, Iterable[int]], since_frame: int = 0) -> None:
        """Hard pruning (eq. 9, 10): `tokens[video]` are full grid indices to remove from all its unprotected frames, or
        from those since a certain one.

        A compressed token goes with the half of the full tokens that it stands for, now or when it is written.
        """
        first = max(since_frame, self.num_protected_frames)
        unprotected = [index for index, frame in enumerate(self.frames) if frame >= first]
        for video, indices in tokens.items():
            condemned = torch.zeros(self.tokens_per_frame, dtype=torch.bool)
            condemned[list(indices)] = True
            self._evicted[video, unprotected] |= condemned
        where = torch.searchsorted(torch.tensor(self.frames, dtype=torch.long), self._frame)
        lost = self._lost(self._evicted)  # (B, frames, tokens)
        self._keep(~lost.flatten(1).gather(1, where * lost.shape[2] + self._token))

    @contextmanager
    def writing(self) -> Iterator[int]:
        """The context pass: gives how many of the last chunks the forward inside has to carry.

        As long as there is room in the full part, that is the new chunk alone. Then it is the chunk that becomes
        compressed, and all that read it in full: they are encoded again.
        """
        chunks = [*self._full_chunks, self._pass_frames]
        self._evicted = F.pad(self._evicted, (0, 0, 0, len(self._pass_frames)))
        if len(chunks) == self.full_chunk_limit:
            first = chunks[0][0]
            self._keep(self._frame < first)
            self.frames, self.next_frame = [frame for frame in self.frames if frame < first], first
            self._pass_frames, self._num_demoted_frames = sum(chunks, []), len(chunks[0])
            per_chunk = [len(self.stands_for)] + [self.tokens_per_frame] * (len(chunks) - 1)
            self.pass_sizes = [len(chunk) * tokens for chunk, tokens in zip(chunks, per_chunk)]
            self._forget_views()
        num_past = self._held.shape[1]
        with super().writing():
            yield len(self.pass_sizes)
        past = torch.ones(self.num_videos, num_past, dtype=torch.bool)
        self._keep(torch.cat([past, ~self._lost_in_pass()], dim=1))
        self._full_chunks = chunks[1 - self.full_chunk_limit :]

    def newest_values(self) -> torch.Tensor:
        """The last layer's values of all that is held, (rows, tokens, heads, head_dim)."""
        return self._layers[max(self._layers)].value

    def update(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put the chunks of the pass behind the past and return what the last of them attends to.

        Args, Returns: as in [`RollingKVCache`], and with `pad_keys` upstream's zero keys in the end.
        """
        keys, values, mask = super().update(layer, key, value)
        num_padding = -key.shape[1] % KEY_BLOCK
        if self._pending is not None or not self.pad_keys or num_padding == 0:
            return keys, values, mask
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, num_padding)) for x in (keys, values))
        return keys, values, None if mask is None else F.pad(mask, (0, num_padding), value=True)

    def _lost(self, evicted: torch.Tensor) -> torch.Tensor:
        """Tokens that go with the full ones evicted: (B, frames, full tokens) -> (B, frames, all tokens)."""
        return torch.cat([evicted, evicted[:, :, self.stands_for].float().mean(dim=-1) >= 0.5], dim=-1)

    def _pass_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        num_full, num_compressed = self.tokens_per_frame, len(self.stands_for)
        frame = torch.tensor(self._pass_frames, dtype=torch.long)
        demoted, full = frame[: self._num_demoted_frames], frame[self._num_demoted_frames :]
        frame = torch.cat([demoted.repeat_interleave(num_compressed), full.repeat_interleave(num_full)])
        compressed = torch.arange(num_full, num_full + num_compressed).repeat(len(demoted))
        return frame[None], torch.cat([compressed, torch.arange(num_full).repeat(len(full))])[None]

    def _lost_in_pass(self) -> torch.Tensor:
        """Tokens of a context pass that are as good as evicted, (B, seq)."""
        lost = self._lost(self._evicted[:, self._evicted.shape[1] - len(self._pass_frames) :])
        demoted, full = lost[:, : self._num_demoted_frames], lost[:, self._num_demoted_frames :]
        num_full = self.tokens_per_frame
        return torch.cat([demoted[:, :, num_full:].flatten(1), full[:, :, :num_full].flatten(1)], dim=1)

    def _pass_held(self) -> torch.Tensor:
        return super()._pass_held() if self._pending is None else ~self._lost_in_pass()

    def _place(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.places[token].unbind(-1)


class FARSelfAttnProcessor(CachedSelfAttnProcessor):
    """Self-attention of each chunk of a pass to the context, to the chunks of the pass before it, and to itself.

    Upstream's own backend stands for a mask that is not needed here: one that was set on the transformer is used, and
    scaled-dot-product attention otherwise.
    """

    def __init__(self, cache: FARKVCache, layer: int, stock):
        super().__init__(cache, layer, stock)
        self._attention_backend = vars(stock).get("_attention_backend")

    def attend(self, query, key, value, mask=None) -> torch.Tensor:
        """(rows, queries, heads, head_dim)"""
        outputs, num_keys = [], key.shape[1] - query.shape[1]
        for of_chunk in query.split(self.cache.pass_sizes, dim=1):
            num_keys += of_chunk.shape[1]
            seen = None if mask is None else mask[..., :num_keys]
            outputs.append(super().attend(of_chunk, key[:, :num_keys], value[:, :num_keys], seen))
        return torch.cat(outputs, dim=1)


class FARBackbone:
    """An AnyFlow-FAR transformer and its cache as a rollout sees them, like [`WanBackbone`].

    Args:
        transformer (`AnyFlowFARTransformer3DModel`): stays as it is but inside `attached`.
        use_mean_velocity (`bool`): whether the model is told where a step goes, not only where it is.
        pad_keys (`bool`), grid (`tuple[int, int]`), **context: what [`FARKVCache`] takes.
    """

    def __init__(
        self,
        transformer: AnyFlowFARTransformer3DModel,
        use_mean_velocity: bool,
        pad_keys: bool,
        grid: tuple[int, int],
        **context,
    ):
        config = transformer.config
        self.transformer = transformer
        self.use_mean_velocity = use_mean_velocity
        self.recent: list[torch.Tensor] = []  # clean latents of the last chunks, which a context pass may carry again
        scale = tuple(large // small for large, small in zip(config.compressed_patch_size[1:], config.patch_size[1:]))
        of_side = 2 * (config.attention_head_dim // 6)  # as upstream's rotary embedding shares a head
        rope_dims = (config.attention_head_dim - 2 * of_side, of_side, of_side)
        self.cache = FARKVCache(
            grid, rope_dims, scale=scale, full_chunk_limit=config.full_chunk_limit, pad_keys=pad_keys, **context
        )

    def attached(self) -> AbstractContextManager:
        """The transformer reads and writes the cache inside."""
        return replaced_processors(self.transformer, self.cache, FARSelfAttnProcessor, CachedCrossAttnProcessor)

    def predict_flow(
        self,
        latents: torch.Tensor,
        chunk_sizes: Sequence[int],
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor,
        text: torch.Tensor,
        attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """Flow of a chunk behind the cached past; arguments as in [`WanBackbone`]."""
        self.cache.begin_pass(latents.shape[2])
        if not self.use_mean_velocity:
            next_timesteps = timesteps
        flow = self._forward(latents, chunk_sizes, timesteps, next_timesteps, text, attention_kwargs, False)
        return flow.transpose(1, 2)

    def commit(
        self, latents: torch.Tensor, text: torch.Tensor, attention_kwargs: dict[str, Any] | None
    ) -> torch.Tensor:
        """Context pass: keys and values of the clean chunk, and of what it makes the model see otherwise.

        Returns what is finite if the pass was.
        """
        self.recent = [*self.recent, latents][-self.transformer.config.full_chunk_limit :]
        self.cache.begin_pass(latents.shape[2])
        with self.cache.writing() as num_chunks:
            chunks = self.recent[-num_chunks:]
            clean = torch.zeros(num_chunks, device=latents.device)
            sizes = [chunk.shape[2] for chunk in chunks]
            self._forward(torch.cat(chunks, dim=2), sizes, clean, clean, text, attention_kwargs, True)
        return self.cache.newest_values()

    def _forward(self, latents, chunk_sizes, timesteps, next_timesteps, text, attention_kwargs, is_cache_step):
        """The transformer's own forward over some chunks alone; the others are in our processors."""
        sizes = torch.tensor(chunk_sizes, device=latents.device)
        timesteps, next_timesteps = (
            of_chunks.repeat_interleave(sizes).expand(len(latents), -1) for of_chunks in (timesteps, next_timesteps)
        )
        return self.transformer(
            hidden_states=latents.transpose(1, 2).to(self.transformer.dtype),  # (rows, T, C, H, W)
            timestep=timesteps,
            r_timestep=next_timesteps,
            encoder_hidden_states=text.to(self.transformer.dtype),
            chunk_partition=list(chunk_sizes),
            kv_cache=[None] * len(self.transformer.blocks),
            kv_cache_flag={"is_cache_step": is_cache_step, "num_cached_chunks": 0},
            attention_mask=False,  # so that none is built
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]
