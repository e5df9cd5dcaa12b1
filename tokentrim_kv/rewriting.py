# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lets a hook of a layout rewrite the past of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..tokentrim_checks import check_saved
from ..tokentrim_views.memory import Memory
from ..tokentrim_views.rope import Pair, RotaryGrid, rotate
from .book import TokenBook


@dataclass
class LayerContext:
    """One layer's context, (rows, tokens, heads, head_dim), keys rotated at their latent frames."""

    key: torch.Tensor
    value: torch.Tensor
    tag: torch.Tensor | None = None  # (rows, tokens, 3): see `Memory`
    note: torch.Tensor | None = None  # (rows, ...)

    def to(self, device: str | torch.device) -> "LayerContext":
        tables = (self.key, self.value, self.tag, self.note)
        return LayerContext(*(None if each is None else each.to(device) for each in tables))

    def check(self, num_rows: int, num_tokens: int, head: tuple[int, int]) -> None:
        """Refuse tables of a saved run that are not of this many rows and tokens, with (heads, head_dim)."""
        check_saved("keys of the context", self.key, (num_rows, num_tokens, *head))
        check_saved("values of the context", self.value, (num_rows, num_tokens, *head), self.key.dtype)
        if self.tag is not None:
            check_saved("tags of the context", self.tag, (num_rows, num_tokens, 3), torch.long)
        if self.note is not None:
            check_saved("notes of the context", self.note, (num_rows, *[None] * (self.note.dim() - 1)))


@dataclass(frozen=True)
class Rewriter:
    """Shows the past of a layer to a layout's hooks, before a pass reads it.

    Args:
        book ([`TokenBook`]): of the past.
        frames (`list[int]`): its latent frames, ascending.
        new (`list[int]`): latent frames of the pass.
        rope ([`RotaryGrid`]): of the tokens.
        angles (`tuple`): cosine and sine of all tokens of the book at their latent frames.
    """

    book: TokenBook
    frames: list[int]
    new: list[int]
    rope: RotaryGrid
    angles: Pair

    def rewrite(self, hook: Callable, past: LayerContext, query: torch.Tensor) -> None:
        """Let `hook(memory, new, query)` rewrite a context in place; `query` is the pass's, (rows, seq, heads, head_dim),
        not rotated."""
        cos, sin = self.angles
        held = past.key
        projected = past.key = rotate(held, cos, -sin)
        self._rewrite_rows(hook, past, query)
        same = (past.key == projected).flatten(2).all(dim=-1)[:, :, None, None]
        past.key = held.where(same, rotate(past.key, cos, sin).to(held.dtype))  # unchanged keys are not rounded again

    @torch.no_grad()
    def _rewrite_rows(self, hook: Callable, past: LayerContext, query: torch.Tensor) -> None:
        """Row by row, keys not rotated. In a pass without guidance, the queries of the conditional branch serve both."""
        places = self.rope.places
        columns = self.book.columns(self.frames, len(places)).to(past.key.device)
        tag = past.key.new_zeros(*past.key.shape[:2], 3, dtype=torch.long) if past.tag is None else past.tag.clone()
        key, value, notes = past.key.clone(), past.value.clone(), []
        for row in range(len(key)):
            places_of_row = columns[row % len(columns)]
            held, taken = places_of_row >= 0, places_of_row.clamp(min=0)
            note = None if past.note is None else past.note[row]
            tables = (key[row][taken], value[row][taken], tag[row][taken])
            memory = Memory(self.frames, held, *tables, note, places, self.rope.rope_dims)
            hook(memory, self.new, query[row % len(query)].detach())
            for table, rewritten in ((key, memory.key), (value, memory.value), (tag, memory.tag)):
                table[row, places_of_row[held]] = rewritten[held].to(table.dtype)
            notes.append(memory.note)
        past.key, past.value, past.tag = key, value, tag
        past.note = None if notes[0] is None else torch.stack(notes)
