# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The contract of a backbone: a causal transformer and its cached past, as a rollout sees them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import ModelMixin

from ..tokentrim_checks import check_saved
from ..tokentrim_kv.cache import RollingKVCache
from ..tokentrim_views.layout import Layout, Pass


@dataclass(frozen=True)
class Limits:
    """What a rollout on a backbone cannot do. The defaults are those of a backbone without limits.

    Args:
        model (`str`): name of the model family, for messages.
        sizes (`tuple[int, int, int]`): transformer blocks, heads of each, and size of a head.
        max_in_flight (`int`, *optional*): chunks that can be denoised together; `None` for any number.
        weights (`bool`): whether cached tokens can count for less instead of leaving.
        transitions (`tuple[str, ...]`, *optional*):
            what can happen to the context when the prompt changes; `None` for everything that the layout can do.
        chunks_per_pass (`int`): chunks that the longest context pass carries.
        min_size (`tuple[int, int]`): smallest latent (height, width) of a video of more than `chunks_per_pass` chunks.
        parallel (`bool`): whether it runs under context parallelism.
        context_noise (`bool`): whether a commit can have another timestep than 0.
    """

    model: str
    sizes: tuple[int, int, int]
    max_in_flight: int | None = None
    weights: bool = True
    transitions: tuple[str, ...] | None = None
    chunks_per_pass: int = 1
    min_size: tuple[int, int] = (1, 1)
    parallel: bool = True
    context_noise: bool = True


@dataclass(frozen=True)
class BackboneOptions:
    """What a call passes on to its backbone. A backbone ignores the options that its model does not have.

    Args:
        attention_kwargs (`dict`, *optional*): passed to every forward of the transformer.
        use_mean_velocity (`bool`): whether the model is given the timestep that a step leads to.
        pad_keys (`bool`): whether a denoised chunk also attends to the zero keys that upstream's pipeline adds.
    """

    attention_kwargs: dict[str, Any] | None = None
    use_mean_velocity: bool = True
    pad_keys: bool = True


class Backbone(Protocol):
    """A transformer and its cached past: the flow of the chunks in flight, and a past that grows by chunks.

    Only a backbone touches its `cache`. The methods with a body here serve every backbone whose past is one
    [`RollingKVCache`].

    Args:
        transformer (`ModelMixin`): unchanged except inside `attached`.
        grid (`tuple[int, int]`): tokens of a latent frame, (height, width).
        num_videos (`int`): B. A transformer batch has `rows`, B or 2 B of them with classifier-free guidance.
        layout ([`Layout`], *optional*): which past frames stay, and which of them a pass reads.
        num_protected_frames (`int`): first latent frames that eviction leaves alone.
        options ([`BackboneOptions`]): what the call passes on.

    Attributes:
        limits ([`Limits`]): what a rollout on it cannot do.
        cache ([`RollingKVCache`]): its past.
    """

    transformer: ModelMixin
    limits: Limits
    cache: RollingKVCache

    def __init__(
        self,
        transformer: ModelMixin,
        grid: tuple[int, int],
        num_videos: int,
        layout: Layout | None = None,
        num_protected_frames: int = 0,
        options: BackboneOptions = BackboneOptions(),
    ): ...

    @classmethod
    def limits_of(cls, transformer: ModelMixin) -> Limits:
        """
        The limits of a rollout on a transformer.

        Raises:
            `ValueError`: the transformer's config is one that no rollout can run on.
        """
        ...

    @property
    def context_version(self) -> int:
        """A number that changes whenever a pass would read something else of the past."""
        return self.cache.version

    def attached(self) -> AbstractContextManager[None]:
        """A context in which the transformer reads and writes the past."""
        ...

    def only(self, videos: Iterable[int]) -> AbstractContextManager[None]:
        """A context in which forwards carry the rows of some videos of the batch."""
        return self.cache.only(videos)

    def make_room(self, num_frames: int) -> None:
        """Before a chunk of `num_frames` latent frames: drop the past frames that the layout does not keep."""
        self.cache.make_room(num_frames)

    def predict_flow(
        self,
        latents: torch.Tensor,
        chunk_sizes: Sequence[int],
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor,
        text: torch.Tensor,
        pass_: Pass = Pass(),
    ) -> torch.Tensor:
        """
        Predict the flow of the chunks in flight behind the cached past.

        Args:
            latents (`torch.Tensor`): the chunks, (rows, C, T, H, W).
            chunk_sizes (`Sequence[int]`): latent frames of each chunk.
            timesteps (`torch.Tensor`): timestep of each chunk, (chunks,).
            next_timesteps (`torch.Tensor`): timestep that each chunk's step leads to, (chunks,).
            text (`torch.Tensor`): text embeddings, (rows, text, dim).
            pass_ ([`Pass`]): which pass this is, for the layout.

        Returns:
            `torch.Tensor`: the flow prediction, shaped like `latents`.
        """
        ...

    def commit(
        self, latents: torch.Tensor, text: torch.Tensor, entered: Sequence[bool], timestep: float = 0.0
    ) -> torch.Tensor:
        """
        Write a finished chunk into the past, in a forward of its clean latents.

        Args:
            latents (`torch.Tensor`): clean latents, (rows, C, T, H, W).
            text (`torch.Tensor`): text embeddings, (rows, text, dim).
            entered (`Sequence[bool]`): for each video, whether its chunk enters; of the others, nothing stays.
            timestep (`float`): the timestep that the model is given.

        Returns:
            `torch.Tensor`: whether the outcome of the pass is finite, a boolean scalar on the model's device.
        """
        ...

    def evict(self, tokens: Mapping[int, Iterable[int]], weight: float = 0.0) -> dict[int, list[int]]:
        """
        Remove tokens from all unprotected frames of the past (hard pruning, eq. 9 and 10).

        Args:
            tokens (`Mapping`): grid tokens, by video.
            weight (`float`): above 0, the tokens stay and count for this much (soft pruning).

        Returns:
            `dict[int, list[int]]`: the grid tokens of which something was held, by video. Videos that lost nothing are
            left out.
        """
        ...

    def recache(self, text: torch.Tensor, timestep: float = 0.0) -> torch.Tensor | None:
        """
        Encode the window again under another prompt.

        Returns:
            `torch.Tensor` or `None`: whether the outcome is finite, as in `commit`; `None` if no pass was needed.
        """
        ...

    def prompt_changed(self) -> None:
        """Project the text embeddings anew at the next forward."""
        self.cache.forget_prompt()

    def flush(self, is_cut: bool) -> None:
        """Drop what the layout does not keep at a change of the prompt. After a cut, the next chunk stands apart."""
        self.cache.flush(is_cut)

    def begin_shot(self) -> None:
        """The next chunk is the first of a shot, for layouts that know shots."""
        self.cache.begin_shot()

    def state_dict(self) -> dict:
        """The past between two chunks, as plain values and tensors."""
        ...

    def load_state_dict(self, state: dict, num_rows: int) -> None:
        """
        Continue from the past that `state_dict` returned; forwards have `num_rows`.

        Raises:
            `ValueError`: the tensors of the state are not those of this model and batch.
        """
        config = self.transformer.config
        head = (config.num_attention_heads, config.attention_head_dim)
        self.cache.load_state_dict(state["cache"], num_rows, len(self.transformer.blocks), head)

    def _check_latents(self, name: str, latents: torch.Tensor, num_rows: int, num_frames: int | None = None) -> None:
        """Refuse latents of a saved run that are not (num_rows, C, num_frames, H, W)."""
        channels, patch = self.transformer.config.in_channels, self.transformer.config.patch_size[1:]
        size = [tokens * side for tokens, side in zip(self.cache.grid, patch)]
        check_saved(name, latents, (num_rows, channels, num_frames, *size))

    def _tokens_of_rejected(self, entered: Sequence[bool]) -> dict[int, range]:
        """All grid tokens of the videos whose chunk does not enter."""
        return {video: range(self.cache.tokens_per_frame) for video, enters in enumerate(entered) if not enters}
