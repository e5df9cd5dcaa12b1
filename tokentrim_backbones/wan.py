# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A Wan transformer behind a rolling cache."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from diffusers import ModelMixin, WanTransformer3DModel

from ..tokentrim_checks import check
from ..tokentrim_kv.cache import RollingKVCache
from ..tokentrim_views.layout import Layout
from ..tokentrim_views.view import Pass, check_frames
from .attention import cached_attention
from .backbone import Backbone, BackboneOptions, Limits


def rotary_dims(transformer: WanTransformer3DModel) -> tuple[int, int, int]:
    """How the rotary dimensions of a head are shared among (frame, height, width)."""
    return transformer.rope.t_dim, transformer.rope.h_dim, transformer.rope.w_dim


class WanBackbone(Backbone):
    """A Wan transformer: one pass carries all chunks in flight, each token with the timestep of its chunk."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        grid: tuple[int, int],
        num_videos: int,
        layout: Layout | None = None,
        num_protected_frames: int = 0,
        options: BackboneOptions = BackboneOptions(),
    ):
        self.transformer = transformer
        self.limits = self.limits_of(transformer)
        self.attention_kwargs = options.attention_kwargs
        self.cache = RollingKVCache(grid, rotary_dims(transformer), num_videos, layout, num_protected_frames)
        self.context: dict[int, torch.Tensor] = {}  # clean latents of each held frame, (B, C, 1, H, W)

    @classmethod
    def limits_of(cls, transformer: ModelMixin) -> Limits:
        config = transformer.config
        text_to_video = config.added_kv_proj_dim is None and config.patch_size[0] == 1
        valid = "a text-to-video WanTransformer3DModel with patches of one latent frame"
        check(text_to_video, "transformer", config.get("_class_name", type(transformer).__name__), valid)
        return Limits("Wan", (config.num_layers, config.num_attention_heads, config.attention_head_dim))

    def attached(self) -> AbstractContextManager[None]:
        return cached_attention(self.transformer, self.cache)

    def make_room(self, num_frames: int) -> None:
        super().make_room(num_frames)
        self.context = {frame: self.context[frame] for frame in self.cache.frames}

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
        timestep = timesteps.float()
        if len(chunk_sizes) > 1:  # one for each token, frame-major
            num_tokens = [size * self.cache.tokens_per_frame for size in chunk_sizes]
            timestep = torch.cat([time.expand(num) for time, num in zip(timestep, num_tokens)])[None]
        return self._forward(latents, timestep, text)

    def commit(
        self, latents: torch.Tensor, text: torch.Tensor, entered: Sequence[bool], timestep: float = 0.0
    ) -> torch.Tensor:
        cache, first = self.cache, self.cache.next_frame
        new = list(range(first, first + latents.shape[2]))
        again = check_frames("recommit", cache.layout.recommit(list(cache.frames), list(new)), cache.layout)
        finite = [self._encode_again(again, Pass("self"), text, timestep)] if again else []
        self.context.update(zip(new, latents[: cache.num_videos].split(1, dim=2)))
        cache.committed(latents[: cache.num_videos])
        times = torch.full((1,), timestep, device=latents.device, dtype=torch.float32)
        with cache.writing():
            flow = self.predict_flow(latents, [len(new)], times, times, text, Pass("commit"))
        if not all(entered):
            cache.evict(self._tokens_of_rejected(entered), since_frame=first)
        return torch.stack([*finite, torch.isfinite(flow).all()]).all()

    def evict(self, tokens: Mapping[int, Iterable[int]], weight: float = 0.0) -> dict[int, list[int]]:
        return self.cache.evict(tokens, weight=weight)

    def recache(self, text: torch.Tensor, timestep: float = 0.0) -> torch.Tensor | None:
        """All frames of the window are encoded together, each seeing all (LongLive, arXiv 2509.22622); frames that the
        layout leaves as they are, are read."""
        stay, frames = self.cache.layout.recache(list(self.cache.frames))
        if not frames:
            return None
        self.cache.retain([*stay, *frames])
        return self._encode_again(frames, Pass("recache"), text, timestep)

    def _encode_again(self, frames: list[int], pass_: Pass, text: torch.Tensor, timestep: float) -> torch.Tensor:
        """Encode the last frames of the context again, together; whether the outcome is finite."""
        cache = self.cache
        book = cache.book.of_same(frames, cache.tokens_per_frame)  # evicted tokens stay evicted
        cache.retain(set(cache.frames) - set(frames))
        cache.next_frame = frames[0]
        cache.begin_pass(len(frames), pass_, book)
        latents = torch.cat([self.context[frame] for frame in frames], dim=2)
        latents = latents.repeat(len(text) // len(latents), 1, 1, 1, 1)
        times = torch.full((1,), timestep, device=latents.device, dtype=torch.float32)
        with cache.writing():
            return torch.isfinite(self._forward(latents, times, text)).all()

    def state_dict(self) -> dict:
        return {"cache": self.cache.state_dict(), "context": [[*each] for each in self.context.items()]}

    def load_state_dict(self, state: dict, num_rows: int) -> None:
        super().load_state_dict(state, num_rows)
        self.context = dict(state["context"])
        valid = "of a run of the same call, with the latents of its context's frames"
        check(set(self.cache.frames) <= set(self.context), "state", list(self.context), valid)
        for latents in self.context.values():
            self._check_latents("latents of the context", latents, self.cache.num_videos, 1)

    def _forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.cache.prepare(len(latents), latents.device)
        return self.transformer(
            hidden_states=latents.to(self.transformer.dtype),
            timestep=timestep.expand(len(latents), *timestep.shape[1:]),
            encoder_hidden_states=text.to(self.transformer.dtype),
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )[0]
