# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lets a layout's hook rewrite the past of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..tokentrim_views.memory import Memory
from .book import TokenBook


@dataclass
class LayerContext:
    """One layer's context, (rows, tokens, heads, head_dim)."""

    key: torch.Tensor
    value: torch.Tensor
    tag: torch.Tensor | None = None  # (rows, tokens, 3): see `Memory`
    note: torch.Tensor | None = None  # (rows, ...)


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
