# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The past of one video in one layer, as the hook of a layout may rewrite it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .rope import rotary_angles, rotate


@dataclass
class Memory:
    """The past of one video in one layer by place: place (f, n) is latent frame `frames[f]`, grid token n. A layout's hook
    assigns other keys, values, tags or another note; it cannot fill places that are not held.

    Args:
        frames (`list[int]`): F latent frames, ascending, whether or not their tokens are held.
        held (`torch.Tensor`): whether a place holds a token, (F, N), boolean.
        key (`torch.Tensor`), value (`torch.Tensor`): (F, N, heads, head_dim), keys not rotated; arbitrary at
            places that are not held.
        tag (`torch.Tensor`): integers that a place keeps until a hook changes them, initially zero, (F, N, 3).
        note (`torch.Tensor`, *optional*): a tensor that a hook leaves for the next call of a hook.
        places (`torch.Tensor`): row and column of each grid token, (N, 2).
        rope_dims (`tuple[int, int, int]`): rotary dimensions of a head for (frame, height, width).
        layer (`int`): index of the transformer block.
        surveys (`Sequence[torch.Tensor]`): what the hook `survey` returned in every layer.
    """

    frames: list[int]
    held: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    tag: torch.Tensor
    note: torch.Tensor | None
    places: torch.Tensor
    rope_dims: tuple[int, int, int]
    layer: int = 0
    surveys: Sequence[torch.Tensor] = ()

    def rotated(self, hidden_states: torch.Tensor, time: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim) with the rotary embedding of `time`, (tokens,), and `place`, (tokens, 2), in fp32."""
        angles = rotary_angles(time[None], place[None], self.rope_dims, hidden_states.device)
        return rotate(hidden_states[None], *angles)[0]

    def between(self, start: int, end: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        """The held tokens of the latent frames from `start` on and before `end`: their index (f, n), and on the CPU their
        latent frames and places."""
        time = torch.tensor(self.frames)
        inside = ((time >= start) & (time < end)).to(self.held.device)
        index = (self.held & inside[:, None]).nonzero(as_tuple=True)
        return index, time[index[0].cpu()], self.places[index[1].cpu()]
