# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Keys and values of one layer in memory that is allocated once, and what a pass reads of it without a copy."""

from collections.abc import Callable

import torch

from ..tokentrim_views.rope import Pair, rotate
from .book import Compaction, take_tokens
from .reading import Reading
from .rewriting import LayerContext
from .rows import BatchRows


class LayerStore:
    """Keys and values of one layer, (rows, capacity, heads, head_dim): the first `length` tokens are the past; behind
    them is room for those of a pass. Memory grows by doubling, and gaps are closed once for each eviction.

    Keys are held rotated at their latent frames. A pass that reads them at other positions rotates them by the offset, in
    place, always starting from the held values, so that nothing is rounded twice.

    Args:
        limit (`int`, *optional*): tokens up to which memory grows by doubling; `None`: without bound.
        index (`int`): of the transformer block.

    Attributes:
        keys, values: what a pass reads, its own tokens last, in one piece of memory; `None` if it is not in one piece.
        past: if it is not in one piece, what a pass reads of the past.
        parts: where queries or heads read different frames, what each of them reads of the past.
        new: tokens that a commit has to add and that are not behind the past already.
        prompt: cross-attention keys and values.
    """

    def __init__(self, limit: int | None = None, index: int = 0):
        self.limit = limit
        self.index = index
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.length = 0
        self.tag: torch.Tensor | None = None  # (rows, length, 3): see `Memory`
        self.note: torch.Tensor | None = None
        self.original: torch.Tensor | None = None  # held time channels of the keys that are rotated by an offset now
        self.start = 0  # the first of these keys
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.past: Pair | None = None
        self.parts: list[Pair] = []
        self.new: Pair | None = None
        self.prompt: Pair | None = None
        self.is_begun = False  # whether a pass of the current chunk has read it

    @property
    def num_rows(self) -> int:
        return 0 if self.key is None else self.key.shape[0]

    # 1. What is held

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` behind the past."""
        needed, capacity = self.length + num_tokens, self.key.shape[1]
        if needed > capacity:
            doubled = 2 * capacity if self.limit is None else min(2 * capacity, self.limit)
            if self.limit is not None and needed > 2 * self.limit:  # a layout that keeps more than it reads
                doubled = needed * 5 // 4
            self.key, self.value = (self._allocated(old, max(needed, doubled)) for old in (self.key, self.value))

    def append(self, num_tokens: int) -> None:
        """The tokens of the pass become past: those behind it, or `new` ones."""
        if self.new is not None:
            new, self.new = self.new, None
            if self.key is None:
                self.key, self.value = (each.new_empty(each.shape[0], 0, *each.shape[2:]) for each in new)
            self.reserve(num_tokens)
            end = self.length + num_tokens
            self.key[:, self.length : end], self.value[:, self.length : end] = new
        if self.tag is not None:
            self.tag = torch.nn.functional.pad(self.tag, (0, 0, 0, num_tokens))
        self.length += num_tokens

    def take(self, compaction: Compaction, rows: BatchRows) -> None:
        """Keep the tokens at the columns of a compaction, and close the gaps."""
        self.release()
        if self.key is None:
            return
        columns, first, shift = compaction.columns, compaction.first, compaction.shift
        columns = rows.repeated(columns, self.num_rows).to(self.key.device)
        self.length = columns.shape[1]
        for table in (self.key, self.value):
            if shift is None:
                table[:, first : self.length] = take_tokens(table, columns[:, first:])
                continue
            for begin in range(first, self.length, shift):  # pieces that do not overlap with where they go
                end = min(begin + shift, self.length)
                table[:, begin:end] = table[:, begin + shift : end + shift]
        self.tag = None if self.tag is None else take_tokens(self.tag, columns)

    def context(self) -> LayerContext:
        """The past: a copy of the keys, rotated at their latent frames; values without a copy."""
        key = self.key[:, : self.length].clone()
        if self.original is not None:
            key[:, self.start : self.start + self.original.shape[1], :, : self.original.shape[3]] = self.original
        return LayerContext(key, self.value[:, : self.length], self.tag, self.note, self.index)

    def saved(self) -> list[torch.Tensor | None]:
        """The tables of the past, copied to the CPU."""
        context = self.context()
        tables = (context.key, context.value, context.tag, context.note)
        return [None if each is None else each.to("cpu", copy=True) for each in tables]

    def put(self, context: LayerContext) -> None:
        """Replace the past."""
        self.release()
        if self.length != context.key.shape[1]:
            self.key, self.value, self.length = None, None, context.key.shape[1]
        if self.key is None:
            self.key, self.value = (self._allocated(each, self.length) for each in (context.key, context.value))
        self.key[:, : self.length], self.value[:, : self.length] = context.key, context.value
        self.tag, self.note = context.tag, context.note

    # 2. What a pass reads

    def arrange(self, reading: Reading) -> None:
        """Lay out what a pass reads."""
        self.release()
        if self.key is None:
            return
        if reading.parts:
            self.parts = [self._copied(part) for part in reading.parts]
            return
        start, offset = reading.start, self._offset(reading)
        if reading.columns is not None:
            self.past = self._copied(reading)
            return
        rows = reading.rows.as_slice(self.num_rows, reading.num_rows)
        if rows is not None:
            self.reserve(reading.num_own)
        if offset is not None:
            self.start = start
            self.original = rotate_in_place(self.key[:, start:], *offset)
        if rows is None:  # the rows that are read are copied at each pass
            self.past = self.key[:, start : self.length], self.value[:, start : self.length]
            return
        self.past = self.key[rows, start : self.length], self.value[rows, start : self.length]
        end = self.length + reading.num_own
        self.keys, self.values = (table[rows, start:end] for table in (self.key, self.value))
        # The stride of a single row, which may say how much room there is, would ask for another graph.
        if len(self.keys) == 1:
            self.keys, self.values = self.keys[0][None], self.values[0][None]

    def join(self, key: torch.Tensor, value: torch.Tensor, reading: Reading, is_writing: bool) -> Pair:
        """Put the keys of a pass, not rotated, and its values behind the past; what its queries attend to, rotated."""
        apart = self.keys is None or key.requires_grad  # not in one piece of memory, which no gradient goes through
        if (apart or reading.held_angles is not None) and is_writing:
            self.new = held_keys(key, reading).to(value.dtype), value
        key = rotate(key, *reading.key_angles).to(value.dtype)
        if not apart:
            num_past = self.keys.shape[1] - key.shape[1]
            self.keys[:, num_past:], self.values[:, num_past:] = key, value
            return self.keys, self.values
        if self.past is None:
            return key, value
        past = self.past
        if self.keys is None:
            past = [reading.rows.of_forward(each, reading.num_rows) for each in past]
        return tuple(torch.cat([old, new], dim=1) for old, new in zip(past, (key, value)))

    def join_parts(
        self, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, reading: Reading, is_writing: bool
    ) -> list[tuple[Reading, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As `join`, where queries or heads read different frames: for each part that this layer has, its reading, and
        queries, keys and values."""
        if is_writing:
            self.new = held_keys(key, reading).to(value.dtype), value
        joined = []
        for place, part in enumerate(reading.parts):
            queries, *own = (of_heads(each, part, self.index) for each in (query[:, part.tokens], key, value))
            if not queries.shape[2]:
                continue
            own[0] = rotate(own[0], *part.key_angles).to(value.dtype)
            if self.parts:
                past = [part.rows.of_forward(each, part.num_rows) for each in self.parts[place]]
                own = [torch.cat(pair, dim=1) for pair in zip(past, own)]
            joined.append((part, rotate(queries, *part.query_angles), *own))
        return joined

    def prompt_of(self, rows: BatchRows, num_rows: int, project: Callable[[], Pair]) -> Pair:
        """Cross-attention keys and values of the rows of a forward, (rows, text, heads, head_dim), projected once for a
        prompt."""
        known = 0 if self.prompt is None else len(self.prompt[0])
        if known < rows.num_branches(num_rows) * rows.num_videos:
            with torch.no_grad():  # a prompt is no function of the latents
                projected = project()
            if rows.videos is not None:
                return projected
            self.prompt = projected
        key, value = self.prompt
        return rows.of_forward(key, num_rows), rows.of_forward(value, num_rows)

    def release(self) -> None:
        """Undo the rotation by offsets; no pass reads the layer after that."""
        self.keys = self.values = self.past = None
        self.parts = []
        if self.original is not None:
            self.key[:, self.start : self.start + self.original.shape[1], :, : self.original.shape[3]] = self.original
            self.original = None

    def _offset(self, reading: Reading) -> tuple[int, torch.Tensor, torch.Tensor] | None:
        """The offset of a reading, for all rows."""
        if reading.offset is None:
            return None
        num_moved, *angles = reading.offset
        if len(angles[0]) > 1:
            angles = [reading.rows.repeated(table, self.num_rows) for table in angles]
        return num_moved, *angles

    def _copied(self, reading: Reading) -> Pair:
        """A copy of the tokens that a reading reads of the past, keys where it reads them."""
        tables = [table[:, reading.start : self.length] for table in (self.key, self.value)]
        heads = None if reading.heads is None else reading.heads[self.index]
        if reading.columns is not None:
            columns = reading.rows.repeated(reading.columns, self.num_rows).to(self.key.device)
            tables = [take_tokens(table, columns, heads) for table in tables]
        elif heads is not None:
            tables = [table[:, :, heads] for table in tables]
        key, value = tables
        offset = self._offset(reading)
        if offset is not None:
            key = key.clone() if reading.columns is None and heads is None else key
            rotate_in_place(key, *offset)
        return key, value

    def _allocated(self, old: torch.Tensor, size: int) -> torch.Tensor:
        with torch.inference_mode(False):  # written later, in whatever mode
            new = torch.empty(old.shape[0], size, *old.shape[2:], dtype=old.dtype, device=old.device)
        new[:, : self.length] = old[:, : self.length]
        return new


def held_keys(key: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Keys of a pass, not rotated, as memory holds them: at their latent frames."""
    held = reading.key_angles if reading.held_angles is None else reading.held_angles
    return rotate(key, *held)


def of_heads(table: torch.Tensor, reading: Reading, layer: int) -> torch.Tensor:
    """Of (rows, tokens, heads, head_dim), the heads that a reading serves in a layer."""
    return table if reading.heads is None else table[:, :, reading.heads[layer]]


def rotate_in_place(key: torch.Tensor, num_tokens: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the time channels of the first tokens in place; returns a copy of what they were."""
    channels = key[:, :num_tokens, :, : 2 * cos.shape[-1]]
    before = channels.clone()
    channels.copy_(rotate(before, cos, sin))
    return before
