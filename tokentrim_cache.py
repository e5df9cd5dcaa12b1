# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rolling KV cache of a causal rollout: the one owner of keys, values and token positions. It obeys the views of a
layout and knows no window."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from .tokentrim_layout import Layout, Pass, View, check_frames, check_view
from .tokentrim_memory import (
    LayerContext,
    TokenBook,
    grid_places,
    rewrite_memory,
    rotary_angles,
    rotate,
    take_tokens,
)


class RollingKVCache:
    """Keys and values of the past, (rows, held tokens, heads, head_dim) in each layer.

    Grows by the frames of each `writing` pass; `make_room` lets go what the layout does not keep. A *row* is one
    sequence of the transformer's batch: video v is rows v, v + B, ... (guidance branches). Keys are kept without rotary
    embedding and a second time rotated for the chunk at hand, so that their positions may move and no length meets the
    end of a table. Evicted tokens are gone from memory; rows that hold fewer tokens than the longest are padded and the
    padding masked.

    Args:
        grid (`tuple[int, int]`): tokens of a latent frame, (height, width).
        rope_dims (`tuple[int, int, int]`): rotary dimensions of a head for (frame, height, width).
        num_videos (`int`): B.
        layout ([`Layout`], *optional*): what stays and what is read; by default all of it, at absolute positions.
        num_protected_frames (`int`): first latent frames that eviction leaves alone, beside the layout's sink.
        places (`torch.Tensor`, *optional*): row and column of every token there is, (tokens, 2); the grid's by default.

    Attributes:
        frames (`list[int]`): latent frames of the context, ascending, emptied ones included.
        next_frame (`int`): the latent frame after the context.
        version (`int`): changes whenever what attention reads of the past changes.
        is_writing (`bool`): whether the pass at hand is a commit.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        rope_dims: tuple[int, int, int],
        num_videos: int,
        layout: Layout | None = None,
        num_protected_frames: int = 0,
        places: torch.Tensor | None = None,
    ):
        self.grid = grid
        self.rope_dims = rope_dims
        self.num_videos = num_videos
        self.layout = Layout() if layout is None else layout
        self.num_protected_frames = max(num_protected_frames, getattr(self.layout, "num_sink_frames", 0))
        self.places = grid_places(grid) if places is None else places
        self.version = 0
        self.frames: list[int] = []
        self.next_frame = 0
        self.book = TokenBook.of_frames([], self.tokens_per_frame, num_videos)
        self._pass_frames: list[int] = []
        self._pass_book = self.book
        self._view = View([], [], [])
        self._layers: dict[int, LayerContext] = {}
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pending: dict[int, LayerContext] | None = None
        self._videos: list[int] | None = None
        self._is_cut = False  # whether the next chunk follows a cut
        self._begun: set[int] = set()  # layers that a pass of the chunk at hand has been through
        self._memo: dict[str, tuple] = {}  # what follows from the book and the view, until they change

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def is_writing(self) -> bool:
        return self._pending is not None

    def held_tokens(self, video: int = 0) -> list[tuple[int, int]]:
        """The (latent frame, token) of everything that `video` can attend to, in the order of memory."""
        held = self.book.held[video]
        return list(zip(self.book.frame[video][held].tolist(), self.book.token[video][held].tolist()))

    def newest_values(self) -> torch.Tensor:
        """The last layer's values of all that is held, (rows, tokens, heads, head_dim)."""
        return self._layers[max(self._layers)].value

    # 1. What changes the past

    def make_room(self, num_frames: int) -> None:
        """Before a chunk of `num_frames` latent frames: what the layout does not keep leaves."""
        new = list(range(self.next_frame, self.next_frame + num_frames))
        self.retain(check_frames("keep", self.layout.keep(list(self.frames), new), self.layout))
        self._begun.clear()

    def retain(self, frames: Iterable[int]) -> None:
        """All frames but these leave."""
        kept = set(frames)
        if kept != set(self.frames):
            self.drop(~torch.isin(self.book.frame, torch.tensor(sorted(kept), dtype=torch.long)))
            self.frames = [frame for frame in self.frames if frame in kept]
        self._forget_views()

    def evict(
        self, tokens: Mapping[int, Iterable[int]], since_frame: int = 0, weight: float = 0.0
    ) -> dict[int, list[int]]:
        """Hard pruning (eq. 9, 10): `tokens[video]` are grid indices to remove from all its unprotected frames, or from
        those since a certain one. Soft pruning: with a `weight` they stay, and count for so much less. Returns those of
        which something was held, for each video that had such."""
        gone, sink = torch.zeros_like(self.book.held), self._sink()
        first = max(since_frame, self.num_protected_frames)
        for video, indices in tokens.items():
            named = torch.isin(self.book.token[video], torch.tensor(sorted(indices), dtype=torch.long))
            gone[video] = named & (self.book.frame[video] >= first) & ~torch.isin(self.book.frame[video], sink)
        gone &= self.book.held
        evicted = {
            video: self.book.token[video][gone[video]].unique().tolist() for video in tokens if gone[video].any()
        }
        if weight == 0:
            self.drop(gone)
        elif evicted:
            self.book = self.book.weighted(gone, weight)
            self._changed()
        return evicted

    def drop(self, gone: torch.Tensor) -> None:
        """Remove the tokens of the book where `gone`, (B, tokens), is True; what stays moves to the front of each row."""
        held = self.book.held & ~gone
        if torch.equal(held, self.book.held):
            return
        columns = held.byte().argsort(dim=1, descending=True, stable=True)[:, : int(held.sum(dim=1).max())]
        self.book = self.book.taken(columns, held)
        for layer in self._layers.values():
            row_columns = self._by_row(columns, layer.key.shape[0]).to(layer.key.device)
            layer.take(row_columns)
        self._changed()

    def truncate(self, frame: int) -> None:
        """Remove the latent frames from `frame` on: the next pass carries them again."""
        self.drop(self.book.frame >= frame)
        self.frames, self.next_frame = [each for each in self.frames if each < frame], frame

    def flush(self, is_cut: bool = False) -> None:
        """A change of prompt: what the layout does not keep through it leaves; after a cut, the next chunk stands apart."""
        self.retain(check_frames("flush", self.layout.flush(list(self.frames)), self.layout))
        self._is_cut = is_cut

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A commit: keys and values of the forward inside become context, all layers or none."""
        self._pending = {}
        try:
            yield
            pending = self._pending
        finally:
            self._pending = None
        for index, new in pending.items():
            old = self._layers.get(index)
            if old is not None:
                new = old.appended(new)
            self._layers[index] = new
        gone = F.pad(~self._pass_book.held, (self.book.held.shape[1], 0))  # what nobody may attend to does not enter
        self.book = self.book.appended(replace(self._pass_book, held=torch.ones_like(self._pass_book.held)))
        self.frames = self.frames + self._pass_frames
        self.next_frame += len(self._pass_frames)
        self._is_cut = False
        self._changed()
        self.drop(gone)

    def forget_prompt(self) -> None:
        """The prompt changed: project it again."""
        self._prompt.clear()

    def state_dict(self) -> dict:
        """The context between two chunks: plain values and tensors."""
        return {
            "frames": list(self.frames),
            "next_frame": self.next_frame,
            "book": [self.book.frame, self.book.token, self.book.held, self.book.log_weight],
            "layers": [[each.key, each.value, each.tag, each.note] for _, each in sorted(self._layers.items())],
        }

    def load_state_dict(self, state: dict) -> None:
        self.frames, self.next_frame = list(state["frames"]), state["next_frame"]
        self.book = TokenBook(*state["book"])
        self._layers = {index: LayerContext(*layer) for index, layer in enumerate(state["layers"])}
        self.forget_prompt()
        self._changed()

    # 2. What attention reads

    def begin_pass(self, num_frames: int, pass_: Pass, book: TokenBook | None = None) -> None:
        """The next forwards carry the `num_frames` latent frames after the context, all their tokens or those of
        `book`."""
        frames = list(range(self.next_frame, self.next_frame + num_frames))
        view = self.layout.view(list(self.frames), list(frames), replace(pass_, is_cut=self._is_cut))
        if book is None and (frames, view) == (self._pass_frames, self._view):
            return
        check_view(view, self.layout, self.frames, frames)
        self._pass_frames, self._view = frames, view
        self._pass_book = TokenBook.of_frames(frames, self.tokens_per_frame, self.num_videos) if book is None else book
        self._forget_views()

    @contextmanager
    def only(self, videos: Iterable[int]) -> Iterator[None]:
        """Read for some videos of the batch: the forwards inside carry their rows alone."""
        videos = list(videos)
        self._videos = videos if len(videos) < self.num_videos else None
        try:
            yield
        finally:
            self._videos = None

    def update(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put the tokens of the pass behind the past and return what its queries attend to.

        Args:
            layer (`int`): index of the transformer block.
            key (`torch.Tensor`), value (`torch.Tensor`): of the pass, unrotated, (rows, seq, heads, head_dim).
            query (`torch.Tensor`, *optional*): the same, for layouts that rewrite the past by what is asked for.

        Returns:
            `tuple`: rotated keys and values, (rows, read + seq, heads, head_dim), and a mask, (rows, 1, 1, read + seq):
            `None` where every row reads all of them alike, boolean where some are padding, and what is added to the
            scores where the view weights its frames.
        """
        self._rewrite(layer, query)
        if self._pending is not None:
            self._pending[layer] = LayerContext(key.to(value.dtype), value)
        key = rotate(key, *self._pass_angles("keys", self._view.own_positions, key.device)).to(value.dtype)
        past, mask = self._layers.get(layer), self._mask(len(key), key.device)
        if past is None or past.key.shape[1] == 0:
            return key, value, mask
        if past.read is None:
            columns, cos, sin = self._past_angles(past.key)
            old_key, old_value = (
                old if columns is None else take_tokens(old, columns) for old in (past.key, past.value)
            )
            past.read = rotate(old_key, cos, sin).to(value.dtype), old_value
        keys, values = (
            torch.cat([self._rows(old, len(new)), new], dim=1) for old, new in zip(past.read, (key, value))
        )
        return keys, values, mask

    def rotate_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries of the pass at hand, (rows, seq, heads, head_dim), at their positions, in fp32."""
        if self._view.query_positions is None:
            return rotate(query, *self._pass_angles("keys", self._view.own_positions, query.device))
        return rotate(query, *self._pass_angles("queries", self._view.query_positions, query.device))

    def prompt(
        self, layer: int, num_rows: int, project: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention keys and values of `layer` for the rows at hand, projected once for a prompt, (rows, text, heads,
        head_dim)."""
        known = len(self._prompt[layer][0]) if layer in self._prompt else 0
        if known < self._num_branches(num_rows) * self.num_videos:
            with torch.no_grad():  # a prompt is no function of the latents
                projected = project()
            if self._videos is not None:
                return projected
            self._prompt[layer] = projected
        key, value = self._prompt[layer]
        return self._rows(key, num_rows), self._rows(value, num_rows)

    # 3. Inside

    def _rewrite(self, layer: int, query: torch.Tensor | None) -> None:
        """Let the layout rewrite what a layer holds before the first pass of a chunk, and before its commit, read it."""
        due = ["before_chunk"] * (layer not in self._begun) + ["before_commit"] * self.is_writing
        self._begun.add(layer)
        for name in due if layer in self._layers else ():
            hook = getattr(self.layout, name, None)
            if hook is not None:
                past, new = self._layers[layer], list(self._pass_frames)
                rewrite_memory(hook, past, self.book, list(self.frames), new, query, self.places, self.rope_dims)

    def _sink(self) -> torch.Tensor:
        """The frames that the layout saves from eviction."""
        sink = getattr(self.layout, "sink", None)
        return torch.tensor([] if sink is None else sink(list(self.frames)), dtype=torch.long)

    def _changed(self) -> None:
        self.version += 1
        self._forget_views()

    def _forget_views(self) -> None:
        """What was derived from the context or its positions no longer holds."""
        self._memo.clear()
        for layer in self._layers.values():
            layer.read = None

    def _by_row(self, table: torch.Tensor, num_rows: int) -> torch.Tensor:
        """A table by video as a table by row: (B, ...) -> (branches * B, ...)."""
        return table.repeat(num_rows // self.num_videos, *[1] * (table.ndim - 1))

    def _num_branches(self, num_rows: int) -> int:
        """Guidance branches of a forward of `num_rows`."""
        return num_rows // (self.num_videos if self._videos is None else len(self._videos))

    def _rows(self, by_row: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The `num_rows` of the forward at hand: of the videos that are being read, in its guidance branches. One that is
        not guided carries the last branch alone, the conditional one."""
        first = len(by_row) - self._num_branches(num_rows) * self.num_videos
        if self._videos is None:
            return by_row[first:] if first else by_row
        starts = range(first, len(by_row), self.num_videos)
        return by_row[[start + video for start in starts for video in self._videos]]

    def _reading(self) -> tuple[TokenBook, torch.Tensor, torch.Tensor | None]:
        """What the pass at hand reads of the past: its book, the index in the view of each token's frame, (B, tokens),
        and the columns of memory, unless that is all of it as it lies there."""
        if "reading" not in self._memo:
            frames, book, columns = self._view.frames, self.book, None
            index = torch.cat([self._order(places) for places in self._places(frames)], dim=1)
            held = index < len(frames)
            last = index.masked_fill(~held, -1).cummax(dim=1).values  # of what is read so far; padding may lie between
            if not torch.equal(held, book.held) or bool((held & (index < last)).any()):
                taken = index.argsort(dim=1, stable=True)[:, : int(held.sum(dim=1).max())]
                columns = taken % book.held.shape[1]
                book = replace(book.taken(columns, book.held), held=held.gather(1, taken))
                index = index.gather(1, taken)
            self._memo["reading"] = (book, index, columns)
        return self._memo["reading"]

    @staticmethod
    def _places(frames: Sequence[int]) -> list[dict[int, int]]:
        """Where each frame is among `frames`; where it is read the second time, in a second dict, and so on."""
        rounds: list[dict[int, int]] = [{}]
        for place, frame in enumerate(frames):
            free = next((places for places in rounds if frame not in places), None)
            if free is None:
                rounds.append(free := {})
            free[frame] = place
        return rounds

    def _order(self, places: Mapping[int, int]) -> torch.Tensor:
        """The place of each token's frame, (B, tokens), or how many frames are read where it is none of them."""
        unread = len(self._view.frames)
        order = torch.full((self.next_frame + 1,), unread, dtype=torch.long)
        order[torch.tensor([*places], dtype=torch.long)] = torch.tensor([*places.values()], dtype=torch.long)
        return order[self.book.frame.clamp(max=self.next_frame)].where(self.book.held, unread)

    def _mask(self, num_rows: int, device: torch.device) -> torch.Tensor | None:
        """What the queries of the `num_rows` at hand may attend to, (rows, 1, 1, keys), where that is not all alike."""
        if "mask" not in self._memo:
            book, index, _ = self._reading()
            mask = torch.cat([book.held, self._pass_book.held], dim=1)
            of_frames, both = self._view.log_weights, book.appended(self._pass_book).log_weight
            if of_frames is not None or both is not None:
                weights = torch.zeros(mask.shape, dtype=torch.float32) if both is None else both
                if of_frames is not None:
                    of_tokens = torch.tensor([*of_frames, 0.0], dtype=torch.float32)[index]
                    weights = weights + F.pad(of_tokens, (0, self._pass_book.held.shape[1]))
                mask = weights.masked_fill(~mask, -torch.inf)
            elif mask.all():
                mask = None
            self._memo["mask"] = (mask if mask is None else mask.to(device),)
        (mask,) = self._memo["mask"]
        if mask is None:
            return None
        mask = mask if self._videos is None else mask[self._videos]
        return mask.repeat(num_rows // len(mask), 1)[:, None, None, :]

    def _past_angles(self, key: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The columns of `key` that the pass at hand reads, unless all; cosine and sine of their positions."""
        if "past" not in self._memo:
            book, index, columns = self._reading()
            if columns is not None:
                columns = self._by_row(columns, key.shape[0]).to(key.device)
            position, token = torch.tensor([*self._view.positions, 0])[index], book.token
            if book.is_shared():
                position, token = position[:1], token[:1]  # rows alike share one table
            else:
                position, token = self._by_row(position, key.shape[0]), self._by_row(token, key.shape[0])
            self._memo["past"] = (columns, *self._rotary_angles(position, token, key.device))
        return self._memo["past"]

    def _pass_angles(self, name: str, positions: Sequence[int], device: torch.device) -> tuple:
        """Cosine and sine of the tokens of the pass, whose frames stand at `positions`."""
        if name not in self._memo:
            frame, token = self._pass_book.frame[:1], self._pass_book.token[:1]
            position = torch.tensor(positions)[frame - self.next_frame]
            self._memo[name] = self._rotary_angles(position, token, device)
        return self._memo[name]

    def _rotary_angles(
        self, position: torch.Tensor, token: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine at (temporal position, token), both (batch, seq) -> (batch, seq, 1, head_dim / 2)."""
        return rotary_angles(position, self.places[token], self.rope_dims, device)
