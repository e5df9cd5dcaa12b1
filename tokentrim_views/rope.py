# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Rotary position embedding: angles, rotation, and the places of a token grid."""

from dataclasses import dataclass

import torch


ROPE_THETA = 10000.0  # the default of `WanRotaryPosEmbed`, which Diffusers' Wan models do not store

Pair = tuple[torch.Tensor, torch.Tensor]


def rotate(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (batch, seq, heads, head_dim) by (batch or 1, seq, 1, head_dim / 2), in fp32."""
    even, odd = hidden_states.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotary_angles(
    position: torch.Tensor, place: torch.Tensor, rope_dims: tuple[int, int, int], device: torch.device
) -> Pair:
    """Cosine and sine at temporal positions (batch, seq) and (row, column), (batch, seq, 2) -> (batch, seq, 1,
    head_dim / 2)."""
    cos, sin = [], []
    for axis, dim in zip((position, *place.unbind(-1)), rope_dims):
        frequencies = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        distinct, where = axis.unique(return_inverse=True)
        angles, where = distinct[:, None] * frequencies, where.to(device)  # in float64: exact however far
        cos.append(angles.cos().float().to(device)[where])
        sin.append(angles.sin().float().to(device)[where])
    return torch.cat(cos, dim=-1)[:, :, None, :], torch.cat(sin, dim=-1)[:, :, None, :]


def grid_places(grid: tuple[int, int]) -> torch.Tensor:
    """Row and column of each token of a grid, (tokens, 2), row-major."""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))


@dataclass
class RotaryGrid:
    """The rotary embedding of the tokens of a grid.

    Args:
        places (`torch.Tensor`): row and column of every token, (tokens, 2).
        rope_dims (`tuple[int, int, int]`): rotary dimensions of a head for (frame, height, width).
    """

    places: torch.Tensor
    rope_dims: tuple[int, int, int]

    def angles(self, position: torch.Tensor, token: torch.Tensor, device: torch.device) -> Pair:
        """Cosine and sine at (temporal position, token), both (batch, seq) -> (batch, seq, 1, head_dim / 2)."""
        return rotary_angles(position, self.places[token], self.rope_dims, device)

    def offset_angles(self, offset: torch.Tensor, device: torch.device) -> Pair:
        """Cosine and sine that move keys by temporal offsets, (batch, seq) -> (batch, seq, 1, time channels / 2)."""
        return rotary_angles(offset, torch.zeros(*offset.shape, 0), self.rope_dims[:1], device)
