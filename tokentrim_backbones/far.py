# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""An AnyFlow-FAR transformer behind a rolling cache.

Its context is encoded chunk by chunk: the last chunks in full resolution, older ones compressed, in larger patches.
It is chunk-causal, so that a compressed chunk never changes once it is written. A new chunk costs one pass, over the
chunk that it pushes out of the full part, which becomes compressed, and over the full chunks behind that one.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AnyFlowFARTransformer3DModel, ModelMixin

from ..tokentrim_checks import check, check_saved, check_saved_frames
from ..tokentrim_kv.book import TokenBook
from ..tokentrim_kv.cache import RollingKVCache
from ..tokentrim_views.layout import Layout, Pass
from ..tokentrim_views.rope import grid_places
from .attention import CachedCrossAttnProcessor, CachedSelfAttnProcessor, replaced_processors
from .backbone import Backbone, BackboneOptions, Limits


KEY_BLOCK = 128  # upstream fills its queries, and with them the keys, up to a multiple of this


class FARSelfAttnProcessor(CachedSelfAttnProcessor):
    """Self-attention of each chunk of a pass to the context, to the chunks of the pass before it, and to itself.

    Upstream's default backend serves a mask that is not needed here, so that only a backend that the user set is used.

    Args:
        backbone ([`FARBackbone`]): knows the chunks of the pass at hand.
        layer (`int`), stock: as in [`CachedAttnProcessor`].
    """

    def __init__(self, backbone: "FARBackbone", layer: int, stock):
        super().__init__(backbone.cache, layer, stock)
        self.backbone = backbone
        self._attention_backend = vars(stock).get("_attention_backend")

    def attend(self, query, key, value, mask=None, groups=()) -> torch.Tensor:
        """(rows, queries, heads, head_dim); `groups` do not know the padding keys."""
        if self.cache.is_writing:
            return super().attend(query, key, value, mask)
        num_padding = -query.shape[1] % KEY_BLOCK if self.backbone.pad_keys else 0  # upstream's zero keys
        key, value = (F.pad(x, (0, 0, 0, 0, 0, num_padding)) for x in (key, value))
        if mask is not None:
            mask = F.pad(mask, (0, num_padding), value=float(not mask.is_floating_point()))
        return super().attend(query, key, value, mask)


class FARBackbone(Backbone):
    """An AnyFlow-FAR transformer: the last chunks of its past in full resolution, the older ones compressed.

    The cache holds full and compressed tokens under one numbering: the tokens of the full grid, then those of the
    compressed one, which stand in the middle of the full tokens that they stand for. A compressed token is lost when
    half of these full tokens are evicted, before or after it is written.
    """

    def __init__(
        self,
        transformer: AnyFlowFARTransformer3DModel,
        grid: tuple[int, int],
        num_videos: int,
        layout: Layout | None = None,
        num_protected_frames: int = 0,
        options: BackboneOptions = BackboneOptions(),
    ):
        config = transformer.config
        self.transformer = transformer
        self.limits = self.limits_of(transformer)
        self.attention_kwargs = options.attention_kwargs
        self.use_mean_velocity = options.use_mean_velocity
        self.pad_keys = options.pad_keys
        scale = tuple(large // small for large, small in zip(config.compressed_patch_size[1:], config.patch_size[1:]))
        self.stands_for = compressed_patches(grid, scale)  # (compressed tokens, full tokens of each)
        full = grid_places(grid)
        side_dim = 2 * (config.attention_head_dim // 6)  # as upstream's rotary embedding divides a head
        rope_dims = (config.attention_head_dim - 2 * side_dim, side_dim, side_dim)
        places = torch.cat([full, full[self.stands_for].mean(dim=1)])
        self.cache = RollingKVCache(grid, rope_dims, num_videos, layout, num_protected_frames, places)
        self.full_chunks: list[list[int]] = []  # latent frames of each chunk in full resolution
        self.recent: list[torch.Tensor] = []  # clean latents of the last chunks, which a commit may carry again
        # Evicted full tokens, (B, full tokens), of every latent frame that is held or in a full chunk.
        self.evicted: dict[int, torch.Tensor] = {}

    @classmethod
    def limits_of(cls, transformer: ModelMixin) -> Limits:
        config = transformer.config
        check_far(config)
        limit, min_size = config.full_chunk_limit, tuple(config.compressed_patch_size[1:])
        sizes = config.num_layers, config.num_attention_heads, config.attention_head_dim
        return Limits("AnyFlow-FAR", sizes, 1, False, ("keep",), limit, min_size, parallel=False, context_noise=False)

    def attached(self) -> AbstractContextManager[None]:
        make_cross = partial(CachedCrossAttnProcessor, self.cache)
        return replaced_processors(self.transformer, partial(FARSelfAttnProcessor, self), make_cross)

    def make_room(self, num_frames: int) -> None:
        super().make_room(num_frames)
        known = {*self.cache.frames, *sum(self.full_chunks, [])}
        self.evicted = {frame: tokens for frame, tokens in self.evicted.items() if frame in known}

    def predict_flow(
        self,
        latents: torch.Tensor,
        chunk_sizes: Sequence[int],
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor,
        text: torch.Tensor,
        pass_: Pass = Pass(),
    ) -> torch.Tensor:
        self.cache.begin_pass(latents.shape[2], pass_)
        if not self.use_mean_velocity:
            next_timesteps = timesteps
        return self._forward(latents, chunk_sizes, timesteps, next_timesteps, text, False).transpose(1, 2)

    def commit(
        self, latents: torch.Tensor, text: torch.Tensor, entered: Sequence[bool], timestep: float = 0.0
    ) -> torch.Tensor:
        """While the full part has room, the pass carries the new chunk alone. Then it carries the chunk that becomes
        compressed, and all chunks that read it in full, which are encoded again."""
        limit, first = self.transformer.config.full_chunk_limit, self.cache.next_frame
        self.cache.committed(latents[: self.cache.num_videos])
        self.recent = [*self.recent, latents][-limit:]
        chunks = [*self.full_chunks, list(range(first, first + latents.shape[2]))]
        for frame in chunks[-1]:
            self.evicted[frame] = torch.zeros(self.cache.num_videos, self.cache.tokens_per_frame, dtype=torch.bool)
        num_compressed = int(len(chunks) == limit)
        carried = chunks if num_compressed else chunks[-1:]
        if num_compressed:
            self.cache.truncate(chunks[0][0])
        pass_ = Pass("commit", chunk_sizes=tuple(map(len, carried)))
        self.cache.begin_pass(sum(map(len, carried)), pass_, self._commit_book(carried, num_compressed))
        with self.cache.writing():
            clean = torch.full((len(carried),), timestep, device=latents.device, dtype=torch.float32)
            latents = torch.cat(self.recent[-len(carried) :], dim=2)
            self._forward(latents, list(map(len, carried)), clean, clean, text, True)
        self.full_chunks = chunks[1 - limit :]
        finite = torch.isfinite(self.cache.newest_values()).all()  # the pass has no output
        if not all(entered):
            self._evict_since(first, self._tokens_of_rejected(entered))
        return finite

    def evict(self, tokens: Mapping[int, Iterable[int]], weight: float = 0.0) -> dict[int, list[int]]:
        """Returns the tokens that some unprotected frame still had, for each video whose past lost something."""
        check(weight == 0, "prune_weight", weight, "0 for AnyFlow-FAR, which has no weights")
        return self._evict_since(0, tokens)

    def _evict_since(self, first: int, tokens: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
        first, new, held = max(first, self.cache.num_protected_frames), {}, self.cache.book.held.sum(dim=1)
        for video, indices in tokens.items():
            indices = sorted(indices)
            was = [evicted[video, indices] for frame, evicted in self.evicted.items() if frame >= first]
            new[video] = [index for index, *each in zip(indices, *was) if not all(each)]
            for frame, evicted in self.evicted.items():
                if frame >= first:
                    evicted[video, indices] = True
        self.cache.drop(self._lost(self.cache.book, self.cache.frames))
        lost = self.cache.book.held.sum(dim=1) < held
        return {video: indices for video, indices in new.items() if lost[video]}

    def state_dict(self) -> dict:
        return {
            "cache": self.cache.state_dict(),
            "full_chunks": [list(chunk) for chunk in self.full_chunks],
            "recent": list(self.recent),
            "evicted": [[frame, tokens.clone()] for frame, tokens in self.evicted.items()],
        }

    def load_state_dict(self, state: dict, num_rows: int) -> None:
        super().load_state_dict(state, num_rows)
        self.full_chunks, self.recent = list(state["full_chunks"]), list(state["recent"])
        self.evicted = {frame: tokens.clone() for frame, tokens in state["evicted"]}
        full = sum(self.full_chunks, [])
        check_saved_frames("frames in full resolution", full, self.cache.next_frame)
        valid = "of a run of the same call, with all evictions, and latents for all chunks in full resolution"
        check({*self.cache.frames, *full} <= set(self.evicted), "state", list(self.evicted), valid)
        check(len(self.recent) >= len(self.full_chunks), "state", len(self.recent), valid)
        sizes = [None] * (len(self.recent) - len(self.full_chunks)) + list(map(len, self.full_chunks))
        for size, latents in zip(sizes, self.recent):
            self._check_latents("recent latents", latents, num_rows, size)
        for tokens in self.evicted.values():
            check_saved("evictions", tokens, (self.cache.num_videos, self.cache.tokens_per_frame), torch.bool)

    def _lost(self, book: TokenBook, frames: list[int]) -> torch.Tensor:
        """Which tokens of a book of some ascending frames go with the full ones evicted, (B, tokens)."""
        if not frames:
            return torch.zeros_like(book.held)
        evicted = torch.stack([self.evicted[frame] for frame in frames], dim=1)  # (B, frames, full tokens)
        lost = torch.cat([evicted, evicted[:, :, self.stands_for].float().mean(dim=-1) >= 0.5], dim=-1)
        place = torch.searchsorted(torch.tensor(frames), book.frame.contiguous()).clamp(max=len(frames) - 1)
        return lost.flatten(1).gather(1, place * lost.shape[2] + book.token)

    def _commit_book(self, chunks: list[list[int]], num_compressed: int) -> TokenBook:
        """The tokens of a commit of some chunks, of which the first `num_compressed` are compressed."""
        num_full, num_videos = self.cache.tokens_per_frame, self.cache.num_videos
        compressed = TokenBook.of_frames(sum(chunks[:num_compressed], []), len(self.stands_for), num_videos)
        compressed.token = compressed.token + num_full
        book = compressed.appended(TokenBook.of_frames(sum(chunks[num_compressed:], []), num_full, num_videos))
        book.held = ~self._lost(book, sum(chunks, []))
        return book

    def _forward(self, latents, chunk_sizes, timesteps, next_timesteps, text, is_cache_step) -> torch.Tensor:
        """The transformer's own forward over some chunks alone; the others are in our processors."""
        self.cache.prepare(len(latents), latents.device)
        timesteps, next_timesteps = (
            torch.cat([time.expand(size) for time, size in zip(times, chunk_sizes)]).expand(len(latents), -1)
            for times in (timesteps, next_timesteps)
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
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )[0]


def compressed_patches(grid: tuple[int, int], scale: tuple[int, int]) -> torch.Tensor:
    """The full tokens that each compressed token stands for, (compressed tokens, full tokens of each): `scale` of
    them in
    (height, width). Full tokens that do not fill a compressed one are left out."""
    rows, columns = (tokens // per_patch for tokens, per_patch in zip(grid, scale))
    full = torch.arange(grid[0] * grid[1]).view(grid)[: rows * scale[0], : columns * scale[1]]
    patches = full.unflatten(1, (columns, scale[1])).unflatten(0, (rows, scale[0])).transpose(1, 2)
    return patches.flatten(2).flatten(0, 1)


def check_far(config: Any) -> None:
    """Refuse a config that AnyFlow-FAR's forward cannot run."""
    patch, large, limit = tuple(config.patch_size), tuple(config.compressed_patch_size), config.full_chunk_limit
    check(patch[0] == 1 and patch[1] == patch[2], "transformer.config.patch_size", patch, "(1, n, n)")
    whole = large[0] == 1 and not any(size % patch[1] for size in large[1:])
    valid = f"(1, h, w) with multiples of {patch[1]}"
    check(whole, "transformer.config.compressed_patch_size", large, valid)
    valid = "an int >= 2: the current chunk and at least one in full resolution"
    check(limit >= 2, "transformer.config.full_chunk_limit", limit, valid)
