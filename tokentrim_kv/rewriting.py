# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lets the hooks of a layout see and rewrite the past of a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..tokentrim_checks import check, check_saved, check_saved_frames
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
    layer: int = 0

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


def read_context(
    state: dict, num_videos: int, num_places: int, num_rows: int, num_layers: int, head: tuple[int, int]
) -> tuple[TokenBook, list[LayerContext], tuple[list[int], dict[int, torch.Tensor]]]:
    """Book, layers and history of a saved context.

    Raises:
        `ValueError`: its tables are not those of such a model.
    """
    frames, tables, book = state["frames"], state["layers_at_home"], TokenBook(*state["book"])
    check_saved_frames("frames of the context", frames, state["next_frame"])
    book.check(num_videos, num_places, frames)
    num_saved, valid = len(tables), f"of a run of the same call, with a context of {num_layers} layers"
    whole = num_saved == len(state["devices"]) == (num_layers if frames or tables else 0)
    check(whole, "state", num_saved, valid)
    layers = [LayerContext(*each) for each in tables]
    for layer in layers:
        layer.check(num_rows, book.held.shape[1], head)
    return book, [layer.to(device) for layer, device in zip(layers, state["devices"])], read_history(state, num_videos)


def read_history(state: dict, num_videos: int) -> tuple[list[int], dict[int, torch.Tensor]]:
    """First frames of shots, and notes on frames, of a saved context; states of older versions have none."""
    shots, notes = list(state.get("shots", ())), dict(state.get("notes", ()))
    check_saved_frames("first frames of shots", shots, state["next_frame"])
    check_saved_frames("frames with a note", list(notes), state["next_frame"])
    for note in notes.values():
        check_saved("a note on a frame", note, (num_videos, *[None] * (getattr(note, "ndim", 1) - 1)))
    return shots, notes


@dataclass(frozen=True)
class Rewriter:
    """Shows the past of a layer to a layout's hooks, before a pass reads it.

    Args:
        book ([`TokenBook`]): of the past.
        frames (`list[int]`): its latent frames, ascending.
        new (`list[int]`): latent frames of the pass.
        rope ([`RotaryGrid`]): of the tokens.
        angles (`tuple`): cosine and sine of all tokens of the book at their latent frames.
        surveys (`Sequence`): for each row, what the hook `survey` returned in every layer.
    """

    book: TokenBook
    frames: list[int]
    new: list[int]
    rope: RotaryGrid
    angles: Pair
    surveys: Sequence[Sequence[torch.Tensor]] = ()

    def survey(self, hook: Callable, past: LayerContext) -> list[torch.Tensor]:
        """What `hook(memory, new)` returns for each row."""
        cos, sin = self.angles
        past.key = rotate(past.key, cos, -sin)
        columns = self.book.columns(self.frames, len(self.rope.places)).to(past.key.device)
        with torch.no_grad():
            return [hook(self._memory(past, columns, row), self.new) for row in range(len(past.key))]

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
        columns = self.book.columns(self.frames, len(self.rope.places)).to(past.key.device)
        tag = past.key.new_zeros(*past.key.shape[:2], 3, dtype=torch.long) if past.tag is None else past.tag.clone()
        key, value, notes = past.key.clone(), past.value.clone(), []
        for row in range(len(key)):
            places_of_row = columns[row % len(columns)]
            memory = self._memory(past, columns, row)
            hook(memory, self.new, query[row % len(query)].detach())
            held = memory.held
            for table, rewritten in ((key, memory.key), (value, memory.value), (tag, memory.tag)):
                table[row, places_of_row[held]] = rewritten[held].to(table.dtype)
            notes.append(memory.note)
        past.key, past.value, past.tag = key, value, tag
        past.note = None if notes[0] is None else torch.stack(notes)

    def _memory(self, past: LayerContext, columns: torch.Tensor, row: int) -> Memory:
        """A copy of a row of the past; `columns`: of each (frame, token) of each video."""
        places = columns[row % len(columns)]
        held, taken = places >= 0, places.clamp(min=0)
        tables = [table[row][taken] for table in (past.key, past.value)]
        tag = torch.zeros(*taken.shape, 3, dtype=torch.long, device=taken.device)
        tag = tag if past.tag is None else past.tag[row][taken]
        note = None if past.note is None else past.note[row]
        surveys = self.surveys[row] if self.surveys else ()
        return Memory(
            self.frames, held, *tables, tag, note, self.rope.places, self.rope.rope_dims, past.layer, surveys
        )
