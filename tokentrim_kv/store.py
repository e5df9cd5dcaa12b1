# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Keys and values of one layer in memory that is allocated once, and what a pass reads of it without a copy."""

from dataclasses import dataclass

import torch

from ..tokentrim_views.rope import rotate
from .book import take_tokens
from .rewriting import LayerContext


Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Arrangement:
    """What a pass reads of the past, the same in all layers.

    Args:
        room (`int`): tokens of the pass, for which there must be room; 0 where they are not put behind the past.
        limit (`int`, *optional*): tokens up to which memory grows by doubling.
        start (`int`): the first token that is read; all behind it are.
        columns (`torch.Tensor`, *optional*): in the place of that, the tokens that are read, (rows, read).
        turn (`tuple`, *optional*): where keys do not stand at home: how many of the first ones that are read, and the
            cosine and sine of the way from there, (rows or 1, turned, 1, time channels / 2).
        rows (`slice`): of the batch.
    """

    room: int
    limit: int | None
    start: int
    columns: torch.Tensor | None
    turn: tuple[int, torch.Tensor, torch.Tensor] | None
    rows: slice


class LayerStore:
    """Keys and values of one layer, (rows, capacity, heads, head_dim): the first `length` tokens are the past, behind them
    is room for those of a pass. Grows by doubling; what leaves is compacted once.

    Keys are rotated. At home they stand at the latent frame that they are of, and so they are held; for a pass that puts
    them elsewhere they are turned, always from home, so that nothing is rounded twice.

    Attributes:
        keys, values: what a pass reads, its own tokens last, in one piece of memory; `None` where it is not.
        past: where it is not: what it reads of the past.
        new: what a commit must add that is not behind the past already.
        prompt: cross-attention keys and values.
    """

    def __init__(self):
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.length = 0
        self.tag: torch.Tensor | None = None  # (rows, length, 3): see `Memory`
        self.note: torch.Tensor | None = None
        self.home: torch.Tensor | None = None  # the first tokens' time channels at home, where they are turned
        self.start = 0  # of what is turned
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.past: Pair | None = None
        self.new: Pair | None = None
        self.prompt: Pair | None = None
        self.is_begun = False  # whether a pass of the chunk at hand has been through

    @property
    def num_rows(self) -> int:
        return 0 if self.key is None else self.key.shape[0]

    # 1. What is held

    def reserve(self, num_tokens: int, limit: int | None) -> None:
        """Room for `num_tokens` behind the past."""
        needed, capacity = self.length + num_tokens, self.key.shape[1]
        if needed > capacity:
            doubled = 2 * capacity if limit is None else min(2 * capacity, limit)
            self.key, self.value = (self._allocated(old, max(needed, doubled)) for old in (self.key, self.value))

    def append(self, num_tokens: int, limit: int | None) -> None:
        """The tokens of the pass become past: those behind it, or `new` ones."""
        if self.new is not None:
            new, self.new = self.new, None
            if self.key is None:
                self.key, self.value = (each.new_empty(each.shape[0], 0, *each.shape[2:]) for each in new)
            self.reserve(num_tokens, limit)
            end = self.length + num_tokens
            self.key[:, self.length : end], self.value[:, self.length : end] = new
        if self.tag is not None:
            self.tag = torch.nn.functional.pad(self.tag, (0, 0, 0, num_tokens))
        self.length += num_tokens

    def take(self, columns: torch.Tensor, first: int, shift: int | None) -> None:
        """Of the past, the tokens at `columns`, (rows, taken), stay: up to `first` where they are, and what is behind, if
        there is a `shift`, that many to the right of where it goes in all rows."""
        self.release()
        self.length = columns.shape[1]
        for table in (self.key, self.value):
            if shift is None:
                table[:, first : self.length] = take_tokens(table, columns[:, first:])
                continue
            for begin in range(first, self.length, shift):  # pieces that do not overlap with where they go
                end = min(begin + shift, self.length)
                table[:, begin:end] = table[:, begin + shift : end + shift]
        self.tag = None if self.tag is None else take_tokens(self.tag, columns)

    def at_home(self) -> LayerContext:
        """Keys as they stand at home, a copy; values as they lie there."""
        key = self.key[:, : self.length].clone()
        if self.home is not None:
            key[:, self.start : self.start + self.home.shape[1], :, : self.home.shape[3]] = self.home
        return LayerContext(key, self.value[:, : self.length], self.tag, self.note)

    def saved(self) -> list[torch.Tensor | None]:
        """The tables of the context at home, on the CPU."""
        context = self.at_home()
        tables = (context.key, context.value, context.tag, context.note)
        return [None if each is None else each.to("cpu", copy=True) for each in tables]

    def put(self, context: LayerContext) -> None:
        """Hold this, with its keys at home."""
        self.release()
        if self.length != context.key.shape[1]:
            self.key, self.value, self.length = None, None, context.key.shape[1]
        if self.key is None:
            self.key, self.value = (self._allocated(each, self.length) for each in (context.key, context.value))
        self.key[:, : self.length], self.value[:, : self.length] = context.key, context.value
        self.tag, self.note = context.tag, context.note

    # 2. What a pass reads

    def arrange(self, arrangement: Arrangement) -> None:
        """Lay out what a pass reads."""
        self.release()
        if self.key is None:
            return
        start, columns, turn, rows = arrangement.start, arrangement.columns, arrangement.turn, arrangement.rows
        if columns is not None:
            key, value = (take_tokens(table, columns) for table in (self.key, self.value))
            if turn is not None:
                turn_keys(key, *turn)
            self.past = key, value
            return
        if arrangement.room:
            self.reserve(arrangement.room, arrangement.limit)
        if turn is not None:
            self.start = start
            self.home = turn_keys(self.key[:, start:], *turn)
        self.past = self.key[rows, start : self.length], self.value[rows, start : self.length]
        if arrangement.room:
            end = self.length + arrangement.room
            self.keys, self.values = (table[rows, start:end] for table in (self.key, self.value))
            # The stride of a single row, which may say how much room there is, would ask for another graph.
            if len(self.keys) == 1:
                self.keys, self.values = self.keys[0][None], self.values[0][None]

    def release(self) -> None:
        """No pass reads it: all keys go home."""
        self.keys = self.values = self.past = None
        if self.home is not None:
            self.key[:, self.start : self.start + self.home.shape[1], :, : self.home.shape[3]] = self.home
            self.home = None

    def _allocated(self, old: torch.Tensor, size: int) -> torch.Tensor:
        with torch.inference_mode(False):  # written later, in whatever mode
            new = torch.empty(old.shape[0], size, *old.shape[2:], dtype=old.dtype, device=old.device)
        new[:, : self.length] = old[:, : self.length]
        return new


def turn_keys(key: torch.Tensor, num_tokens: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the time channels of the first tokens in place; what they were before."""
    channels = key[:, :num_tokens, :, : 2 * cos.shape[-1]]
    before = channels.clone()
    channels.copy_(rotate(before, cos, sin))
    return before


def group_by_length(mask: torch.Tensor, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a boolean mask, (rows, keys), that read equally many keys: their indices, (grouped,), and those of their
    keys, (grouped, read)."""
    lengths, groups = mask.sum(dim=1), []
    for length in lengths.unique().tolist():
        (rows,) = (lengths == length).nonzero(as_tuple=True)
        columns = mask[rows].nonzero()[:, 1].view(len(rows), length)
        groups.append((rows.to(device), columns.to(device)))
    return groups
