# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""From the book of tokens and a view to what a pass reads: columns of memory, rotary angles, a mask. Pure functions."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ..tokentrim_views.rope import Pair, RotaryGrid
from ..tokentrim_views.view import View
from .book import TokenBook
from .rows import BatchRows


@dataclass
class PassTokens:
    """What a pass carries, and what its layout lets it see of the past.

    Args:
        frames (`list[int]`): its latent frames.
        book ([`TokenBook`]): its tokens.
        views (`list[View]`): what it reads, and at which positions; several where queries or heads differ.
        chunk_sizes (`tuple[int, ...]`): see [`Pass`].
    """

    frames: list[int]
    book: TokenBook
    views: list[View]
    chunk_sizes: tuple[int, ...] = ()

    def is_same(self, *others: Sequence) -> bool:
        """Whether frames, views and chunks are those of another pass."""
        return (self.frames, self.views, self.chunk_sizes) == others

    @property
    def is_split(self) -> bool:
        """Whether queries or heads read different frames."""
        return len(self.views) > 1 or self.views[0].queries is not None or self.views[0].heads is not None

    def segments(self) -> list[int]:
        """Tokens of each chunk, where a chunk does not read those after it; otherwise empty."""
        ends = [self.frames[0] + end for end in itertools.accumulate(self.chunk_sizes)]
        counts = [0, *(int((self.book.frame[0] < end).sum()) for end in ends)]
        return [after - before for before, after in itertools.pairwise(counts)]


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
        segments (`list[int]`): tokens of each chunk, where a chunk does not read those after it; otherwise empty.
        parts (`list[Reading]`): where queries or heads read different frames, each of their readings; the other fields are
            then those of the first.
        tokens (`torch.Tensor`, *optional*): of a part, which queries read it, (queries,).
        heads (`list[torch.Tensor]`, *optional*): of a part, which heads of each layer read it; `None`: all.
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
    segments: list[int] = field(default_factory=list)
    parts: list["Reading"] = field(default_factory=list)
    tokens: torch.Tensor | None = None
    heads: list[torch.Tensor] | None = None


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
    of_views = [replace(tokens, views=[view]) for view in tokens.views]
    parts = [_read_view(past, each, rope, rows, num_rows, device) for each in of_views]
    if not tokens.is_split:
        return parts[0]
    return replace(parts[0], parts=[_part(part, each, device) for part, each in zip(parts, of_views)])


def _part(reading: Reading, tokens: PassTokens, device: torch.device) -> Reading:
    """The reading of some queries and heads of a pass."""
    (view,) = tokens.views
    queries = tokens.frames if view.queries is None else view.queries
    (columns,) = torch.isin(tokens.book.frame[0], torch.tensor(queries, dtype=torch.long)).nonzero(as_tuple=True)
    angles = tuple(each[:, columns.to(device)] for each in reading.query_angles)
    heads = None
    if view.heads is not None:
        heads = [torch.tensor(each, dtype=torch.long, device=device) for each in view.heads]
    return replace(reading, query_angles=angles, tokens=columns.to(device), heads=heads)


def _read_view(
    past: TokenBook, tokens: PassTokens, rope: RotaryGrid, rows: BatchRows, num_rows: int, device: torch.device
) -> Reading:
    view = moved_to_pass(tokens.views[0], tokens.frames[0])
    key_angles = query_angles = pass_angles(tokens, view.own_positions, rope, device)
    if view.query_positions is not None:
        query_angles = pass_angles(tokens, view.query_positions, rope, device)
    is_moved = view.own_positions != tokens.frames
    held_angles = pass_angles(tokens, tokens.frames, rope, device) if is_moved else None
    selection = select_tokens(past, view, rope.places)
    offset = key_offsets(view, selection)
    offset = None if offset is None else (offset.shape[1], *rope.offset_angles(offset, device))
    mask, groups = attention_mask(view, selection, tokens.book), []
    if mask is not None:
        mask = rows.masked(mask, num_rows)
        groups = [] if mask.is_floating_point() else group_by_length(mask[:, 0, 0], device)
        mask = mask.to(device)
    num_own, angles = tokens.book.held.shape[1], (key_angles, query_angles, held_angles)
    return Reading(
        rows, num_rows, *angles, mask, groups, num_own, selection.start, selection.columns, offset, tokens.segments()
    )


# 1. Columns


def select_tokens(book: TokenBook, view: View, places: torch.Tensor) -> Selection:
    """The tokens of a view's frames in a book; `places` are row and column of each grid token. Without a copy if they are
    all tokens from some column on, in any order."""
    num_held = book.held.shape[1]
    index = _view_index(book, view.frames)
    if view.strides is not None:
        stride = torch.tensor([*view.strides, 1])[index]
        rounds = index.shape[1] // max(num_held, 1)
        on_stride = (places[book.token.repeat(1, rounds)] % stride[..., None] == 0).all(dim=-1)
        index = index.where(on_stride, len(view.frames))
    read = index < len(view.frames)
    start = int(read.any(dim=0).byte().argmax()) if read.any() else num_held
    if index.shape[1] == num_held and torch.equal(read[:, start:], book.held[:, start:]):
        return Selection(book.since(start), index[:, start:], None, start)
    taken = index.argsort(dim=1, stable=True)[:, : int(read.sum(dim=1).max())]
    columns = taken % num_held
    selected = replace(book.taken(columns, book.held), held=read.gather(1, taken))
    return Selection(selected, index.gather(1, taken), columns, 0)


def _view_index(book: TokenBook, frames: Sequence[int | Sequence[int]]) -> torch.Tensor:
    """The index of each token's frame in a view, (B, rounds x tokens); the number of frames for all others."""
    if not any(isinstance(entry, (list, tuple)) for entry in frames):
        return torch.cat([_frame_index(book, places, len(frames)) for places in _places(frames)], dim=1)
    by_video = [
        _view_index(
            book.of_video(video), [each[video] if isinstance(each, (list, tuple)) else each for each in frames]
        )
        for video in range(len(book.held))
    ]
    longest = max(index.shape[1] for index in by_video)  # where a frame is read twice
    return torch.cat([F.pad(index, (0, longest - index.shape[1]), value=len(frames)) for index in by_video])


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
