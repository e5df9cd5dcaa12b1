# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a rolling cache is made of: the book of tokens, a layer's keys and values, rotary embedding; and the past of one
video in one layer as a layout may rewrite it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch


ROPE_THETA = 10000.0  # `WanRotaryPosEmbed`'s default, which the model neither changes nor keeps


def rotate(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (batch, seq, heads, head_dim) by (batch or 1, seq, 1, head_dim / 2), in fp32."""
    even, odd = hidden_states.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotary_angles(
    position: torch.Tensor, place: torch.Tensor, rope_dims: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
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


def take_tokens(by_token: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Tokens of (rows, tokens, ...) by `columns`, (rows, taken)."""
    return by_token[torch.arange(len(columns), device=columns.device)[:, None], columns]


@dataclass
class TokenBook:
    """Which (latent frame, index among the places) each token of a sequence is, (B, tokens) each; `held` is False where
    a row is padding, or where nobody may attend to the token; `log_weight` is added to its scores, if there is one."""

    frame: torch.Tensor
    token: torch.Tensor
    held: torch.Tensor
    log_weight: torch.Tensor | None = None

    @classmethod
    def of_frames(cls, frames: Sequence[int], num_tokens: int, num_videos: int) -> "TokenBook":
        """All `num_tokens` tokens of each of some latent frames, frame-major."""
        frame = torch.tensor(frames, dtype=torch.long).repeat_interleave(num_tokens).expand(num_videos, -1)
        token = torch.arange(num_tokens).repeat(len(frames)).expand(num_videos, -1)
        return cls(frame, token, torch.ones_like(frame, dtype=torch.bool))

    def taken(self, columns: torch.Tensor, held: torch.Tensor) -> "TokenBook":
        """The tokens at `columns`, (B, taken), of which `held`, (B, tokens), are."""
        log_weight = None if self.log_weight is None else self.log_weight.gather(1, columns)
        return TokenBook(*(table.gather(1, columns) for table in (self.frame, self.token, held)), log_weight)

    def since(self, column: int) -> "TokenBook":
        """The tokens from `column` on."""
        log_weight = None if self.log_weight is None else self.log_weight[:, column:]
        return TokenBook(self.frame[:, column:], self.token[:, column:], self.held[:, column:], log_weight)

    def appended(self, other: "TokenBook") -> "TokenBook":
        pairs = ((self.frame, other.frame), (self.token, other.token), (self.held, other.held))
        log_weight = None
        if self.log_weight is not None or other.log_weight is not None:
            both = (
                torch.zeros(book.held.shape, dtype=torch.float32) if book.log_weight is None else book.log_weight
                for book in (self, other)
            )
            log_weight = torch.cat(list(both), dim=1)
        return TokenBook(*(torch.cat(pair, dim=1) for pair in pairs), log_weight)

    def weighted(self, tokens: torch.Tensor, weight: float) -> "TokenBook":
        """With `tokens`, (B, tokens), counting `weight` times what they count for."""
        old = torch.zeros(self.held.shape, dtype=torch.float32) if self.log_weight is None else self.log_weight
        return replace(self, log_weight=old + tokens * math.log(weight))

    def of_same(self, frames: Sequence[int], num_tokens: int) -> "TokenBook":
        """All tokens of some latent frames, held and weighted as they are here."""
        book, columns = (
            TokenBook.of_frames(frames, num_tokens, len(self.held)),
            self.columns(frames, num_tokens).flatten(1),
        )
        weight = None if self.log_weight is None else self.log_weight.gather(1, columns.clamp_min(0)) * (columns >= 0)
        return replace(book, held=columns >= 0, log_weight=weight)

    def is_shared(self) -> bool:
        """Whether all rows hold the same tokens, without padding."""
        alike = [(table == table[:1]).all() for table in (self.frame, self.token)]
        return bool(self.held.all() and alike[0] and alike[1])

    def columns(self, frames: Sequence[int], num_tokens: int) -> torch.Tensor:
        """Where each token of ascending `frames` is in the sequence, (B, frames, num_tokens); -1 where it is not held."""
        columns = torch.full((len(self.held), len(frames), num_tokens), -1)
        video, column = self.held.nonzero(as_tuple=True)
        frame, token = self.frame[video, column], self.token[video, column]
        known = torch.isin(frame, torch.tensor(frames, dtype=torch.long))
        place = torch.searchsorted(torch.tensor(frames, dtype=torch.long), frame[known])
        columns[video[known], place, token[known]] = column[known]
        return columns


@dataclass
class LayerContext:
    """One layer's context, (rows, tokens, heads, head_dim)."""

    key: torch.Tensor
    value: torch.Tensor
    tag: torch.Tensor | None = None  # (rows, tokens, 3): see `Memory`
    note: torch.Tensor | None = None  # (rows, ...)


@dataclass
class Memory:
    """The past of one video in one layer by place: what stands at latent frame `frames[f]`, grid token n. A layout's hook
    assigns other keys, values, tags or another note; places that are not held stay so.

    Args:
        frames (`list[int]`): F latent frames, ascending, whether or not their tokens are held.
        held (`torch.Tensor`): whether a place holds a token, (F, N).
        key (`torch.Tensor`), value (`torch.Tensor`): (F, N, heads, head_dim), keys not rotated; nothing where not held.
        tag (`torch.Tensor`): whole numbers that stay with a place until a hook changes them, at first zero, (F, N, 3).
        note (`torch.Tensor`, *optional*): what a hook left for the next one.
        places (`torch.Tensor`): row and column of each grid token, (N, 2).
        rope_dims (`tuple[int, int, int]`): rotary dimensions of a head for (frame, height, width).
    """

    frames: list[int]
    held: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    tag: torch.Tensor
    note: torch.Tensor | None
    places: torch.Tensor
    rope_dims: tuple[int, int, int]

    def turned(self, hidden_states: torch.Tensor, time: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim) with the rotary embedding of `time`, (tokens,), and `place`, (tokens, 2), in fp32."""
        angles = rotary_angles(time[None], place[None], self.rope_dims, hidden_states.device)
        return rotate(hidden_states[None], *angles)[0]


@torch.no_grad()
def rewrite_memory(
    hook: Callable,
    past: LayerContext,
    book: TokenBook,
    frames: list[int],
    new: list[int],
    query: torch.Tensor,
    places: torch.Tensor,
    rope_dims: tuple[int, int, int],
) -> None:
    """Let `hook(memory, new, query)` rewrite the past of each row of a layer before a pass over the frames `new` reads
    it; `query` is the pass's, (rows, seq, heads, head_dim), not rotated: of a pass that is not guided, the conditional
    branch's serves both."""
    columns = book.columns(frames, len(places)).to(past.key.device)
    tag = past.key.new_zeros(*past.key.shape[:2], 3, dtype=torch.long) if past.tag is None else past.tag.clone()
    key, value, notes = past.key.clone(), past.value.clone(), []
    for row in range(len(key)):
        places_of_row = columns[row % len(columns)]
        held, taken = places_of_row >= 0, places_of_row.clamp(min=0)
        note = None if past.note is None else past.note[row]
        tables = (key[row][taken], value[row][taken], tag[row][taken])
        memory = Memory(frames, held, *tables, note, places, rope_dims)
        hook(memory, new, query[row % len(query)].detach())
        for table, rewritten in ((key, memory.key), (value, memory.value), (tag, memory.tag)):
            table[row, places_of_row[held]] = rewritten[held].to(table.dtype)
        notes.append(memory.note)
    past.key, past.value, past.tag = key, value, tag
    past.note = None if notes[0] is None else torch.stack(notes)
