# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""From the book of tokens and a view to what a pass reads: columns of memory, rotary angles, a mask. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..tokentrim_views.layout import View
from ..tokentrim_views.rope import Pair, RotaryGrid
from .book import TokenBook
from .rows import BatchRows


@dataclass
class PassTokens:
    """What a pass carries, and what its layout lets it see of the past.

    Args:
        frames (`list[int]`): its latent frames.
        book ([`TokenBook`]): its tokens.
        view ([`View`]): what it reads, and at which positions.
    """

    frames: list[int]
    book: TokenBook
    view: View


@dataclass
class Reading:
    """What the forwards of a pass read, the same in all layers.

    Args:
        rows ([`BatchRows`]), num_rows (`int`): rows that a forward carries, and how many they are.
        key_angles (`tuple`), query_angles (`tuple`): cosine and sine of the tokens of the pass, where attention has them.
        held_angles (`tuple`, *optional*): the same where keys are held, if that is another position.
        mask (`torch.Tensor`, *optional*): (rows, 1, 1, keys), see [`RollingKVCache.update`].
        groups (`list`): for kernels without masks, the same as a boolean mask: indices of the rows that read equally many
            keys, (grouped,), and their keys, (grouped, read).
        num_own (`int`): tokens of the pass.
        start (`int`), columns (`torch.Tensor`, *optional*): of the past, see [`Selection`].
        offset (`tuple`, *optional*): for keys that are not read where they are held: how many of the first ones that are
            read, and the cosine and sine of their offsets, (B or 1, moved, 1, time channels / 2).
    """

    rows: BatchRows
    num_rows: int
    key_angles: Pair
    query_angles: Pair
    held_angles: Pair | None
    mask: torch.Tensor | None
    groups: list[Pair]
    num_own: int
    start: int
    columns: torch.Tensor | None
    offset: tuple[int, torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class Selection:
    """The tokens of the past that a pass reads.

    Args:
        book ([`TokenBook`]): of these tokens.
        index (`torch.Tensor`): which frame of the view each token is of, (B, read); the number of frames for padding.
        columns (`torch.Tensor`, *optional*): their columns in memory, (B, read); `None`: all from `start` on.
        start (`int`): the first column.
    """

    book: TokenBook
    index: torch.Tensor
    columns: torch.Tensor | None
    start: int


def read_pass(
    past: TokenBook, tokens: PassTokens, rope: RotaryGrid, rows: BatchRows, num_rows: int, device: torch.device
) -> Reading:
    """What forwards of `num_rows` rows read of the past and of their own tokens."""
    view = moved_to_pass(tokens.view, tokens.frames[0])
    key_angles = query_angles = pass_angles(tokens, view.own_positions, rope, device)
    if view.query_positions is not None:
        query_angles = pass_angles(tokens, view.query_positions, rope, device)
    is_moved = view.own_positions != tokens.frames
    held_angles = pass_angles(tokens, tokens.frames, rope, device) if is_moved else None
    selection = select_tokens(past, view.frames)
    offset = key_offsets(view, selection)
    offset = None if offset is None else (offset.shape[1], *rope.offset_angles(offset, device))
    mask, groups = attention_mask(view, selection, tokens.book), []
    if mask is not None:
        mask = rows.masked(mask, num_rows)
        groups = [] if mask.is_floating_point() else group_by_length(mask[:, 0, 0], device)
        mask = mask.to(device)
    num_own, angles = tokens.book.held.shape[1], (key_angles, query_angles, held_angles)
    return Reading(rows, num_rows, *angles, mask, groups, num_own, selection.start, selection.columns, offset)


# 1. Columns


def select_tokens(book: TokenBook, frames: Sequence[int]) -> Selection:
    """The tokens of `frames`, a view's, in a book. Without a copy if they are all tokens from some column on, in any
    order."""
    num_held = book.held.shape[1]
    index = torch.cat([_frame_index(book, places, len(frames)) for places in _places(frames)], dim=1)
    read = index < len(frames)
    start = int(read.any(dim=0).byte().argmax()) if read.any() else num_held
    if index.shape[1] == num_held and torch.equal(read[:, start:], book.held[:, start:]):
        return Selection(book.since(start), index[:, start:], None, start)
    taken = index.argsort(dim=1, stable=True)[:, : int(read.sum(dim=1).max())]
    columns = taken % num_held
    selected = replace(book.taken(columns, book.held), held=read.gather(1, taken))
    return Selection(selected, index.gather(1, taken), columns, 0)


def _places(frames: Sequence[int]) -> list[dict[int, int]]:
    """The index of each frame in `frames`; of a frame that is read twice, the second index is in a second dict."""
    rounds: list[dict[int, int]] = [{}]
    for place, frame in enumerate(frames):
        free = next((places for places in rounds if frame not in places), None)
        if free is None:
            rounds.append(free := {})
        free[frame] = place
    return rounds


def _frame_index(book: TokenBook, places: Mapping[int, int], unread: int) -> torch.Tensor:
    """The index of each token's frame, (B, tokens); `unread` for tokens of other frames and for padding."""
    last = max(places, default=-1)
    index = torch.full((last + 2,), unread, dtype=torch.long)
    index[torch.tensor([*places], dtype=torch.long)] = torch.tensor([*places.values()], dtype=torch.long)
    return index[book.frame.clamp(max=last + 1)].where(book.held, unread)


# 2. Positions


def moved_to_pass(view: View, first_frame: int) -> View:
    """The view with all positions moved alike, so that the pass stands at its own latent frames: attention depends on
    distances alone."""
    moved = first_frame - view.own_positions[0]

    def move(positions: Sequence[int]) -> list[int]:
        return [position + moved for position in positions]

    queries = None if view.query_positions is None else move(view.query_positions)
    return replace(
        view, positions=move(view.positions), own_positions=move(view.own_positions), query_positions=queries
    )


def key_offsets(view: View, selection: Selection) -> torch.Tensor | None:
    """How far from their latent frames the selected keys are read, (B or 1, tokens), up to the last one that moves;
    `None` if none does."""
    positions = torch.tensor([*view.positions, 0])[selection.index]
    offset = (positions - selection.book.frame).where(selection.book.held, 0)
    if not offset.any():
        return None
    offset = offset[:, : int(offset.any(dim=0).nonzero().max()) + 1]
    return offset[:1] if (offset == offset[:1]).all() else offset


def pass_angles(tokens: PassTokens, positions: Sequence[int], rope: RotaryGrid, device: torch.device) -> Pair:
    """Cosine and sine of the tokens of a pass, whose frames stand at `positions`."""
    position = torch.tensor(positions)[tokens.book.frame[:1] - tokens.frames[0]]
    return rope.angles(position, tokens.book.token[:1], device)


def book_angles(book: TokenBook, num_rows: int, rope: RotaryGrid, device: torch.device) -> Pair:
    """Cosine and sine of all held tokens at their latent frames, for `num_rows` rows, or one that serves all."""
    frame, token = book.frame, book.token
    if book.is_shared():
        frame, token = frame[:1], token[:1]
    else:
        frame, token = (table.repeat(num_rows // len(table), 1) for table in (frame, token))
    return rope.angles(frame, token, device)


# 3. Masks


def attention_mask(view: View, selection: Selection, pass_book: TokenBook) -> torch.Tensor | None:
    """What a pass may attend to, of the past and of itself, (B, keys): boolean, or log weights with -inf where it may
    not; `None` if it attends to everything alike."""
    mask = torch.cat([selection.book.held, pass_book.held], dim=1)
    of_frames, both = view.log_weights, selection.book.appended(pass_book)
    if of_frames is None and both.log_weight is None:
        return None if mask.all() else mask
    weights = both.weights()
    if of_frames is not None:
        of_tokens = torch.tensor([*of_frames, 0.0], dtype=torch.float32)[selection.index]
        weights = weights + F.pad(of_tokens, (0, pass_book.held.shape[1]))
    return weights.masked_fill(~mask, -torch.inf)


def group_by_length(mask: torch.Tensor, device: torch.device) -> list[Pair]:
    """BatchRows of a boolean mask, (rows, keys), that read equally many keys: their indices, (grouped,), and those of their
    keys, (grouped, read)."""
    lengths, groups = mask.sum(dim=1), []
    for length in lengths.unique().tolist():
        (rows,) = (lengths == length).nonzero(as_tuple=True)
        columns = mask[rows].nonzero()[:, 1].view(len(rows), length)
        groups.append((rows.to(device), columns.to(device)))
    return groups
