# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rolling KV cache of a causal rollout: the one owner of keys, values and token positions. It obeys the views of a
layout and knows no window."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..tokentrim_views.layout import Layout, Pass, View, check_frames, check_view
from ..tokentrim_views.rope import grid_places, rotary_angles, rotate
from .book import TokenBook
from .rewriting import LayerContext, rewrite_memory
from .store import Arrangement, LayerStore, group_by_length


class RollingKVCache:
    """Keys and values of the past, (rows, held tokens, heads, head_dim) in each layer.

    Grows by the frames of each `writing` pass; `make_room` lets go what the layout does not keep. A *row* is one
    sequence of the transformer's batch: video v is rows v, v + B, ... (guidance branches). Keys are kept once, rotated, at
    the latent frames that they are of: attention depends on distances alone, so that only those whose distance from the
    present changes, as a sink's, are turned again, and no length meets the end of a table. The tokens of a pass are put
    behind the past, where attention reads both in one piece. Evicted tokens are gone from memory; rows that hold fewer
    tokens than the longest are padded and the padding masked.

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
        groups (`list`): where a boolean mask is due, the same for kernels without masks: indices of the rows that read
            equally many keys, (grouped,), and their keys, (grouped, read).
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
        self._layers: dict[int, LayerStore] = {}
        self._is_writing = False
        self._videos: list[int] | None = None
        self._is_cut = False  # whether the next chunk follows a cut
        self._has_hooks = any(hasattr(self.layout, name) for name in ("before_chunk", "before_commit"))
        window_size = getattr(self.layout, "window_size", None)
        self._limit = window_size * self.tokens_per_frame if isinstance(window_size, int) else None
        # What follows from the book and the view, until they change: see `prepare`.
        self._ready_for = 0  # rows
        self._arrangement: Arrangement | None = None
        self._key_angles = self._query_angles = self._home_angles = None
        self._mask: torch.Tensor | None = None
        self.groups: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def is_writing(self) -> bool:
        return self._is_writing

    def held_tokens(self, video: int = 0) -> list[tuple[int, int]]:
        """The (latent frame, token) of everything that `video` can attend to, in the order of memory."""
        held = self.book.held[video]
        return list(zip(self.book.frame[video][held].tolist(), self.book.token[video][held].tolist()))

    def newest_values(self) -> torch.Tensor:
        """The last layer's values of all that is held, (rows, tokens, heads, head_dim)."""
        layer = self._layers[max(self._layers)]
        return layer.value[:, : layer.length]

    def layer(self, index: int) -> LayerStore:
        """Where a layer's keys and values are held."""
        return self._layers.setdefault(index, LayerStore())

    # 1. What changes the past

    def make_room(self, num_frames: int) -> None:
        """Before a chunk of `num_frames` latent frames: what the layout does not keep leaves."""
        new = list(range(self.next_frame, self.next_frame + num_frames))
        self.retain(check_frames("keep", self.layout.keep(list(self.frames), new), self.layout))
        for layer in self._layers.values():
            layer.is_begun = False

    def retain(self, frames: Iterable[int]) -> None:
        """All frames but these leave."""
        kept = set(frames)
        if kept != set(self.frames):
            self.drop(~torch.isin(self.book.frame, torch.tensor(sorted(kept), dtype=torch.long)))
            self.frames = [frame for frame in self.frames if frame in kept]
        self._ready_for = 0

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
        places = torch.arange(columns.shape[1])
        first = int((columns == places).all(dim=0).cumprod(dim=0).sum())  # up to here, nothing moves
        shifts = (columns - places)[:, first:].unique().tolist()
        for layer in self._stored():
            layer.take(
                self._by_row(columns, layer).to(layer.key.device), first, shifts[0] if len(shifts) == 1 else None
            )
        self.book = self.book.taken(columns, held)
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
        self._is_writing = True
        try:
            yield
        except BaseException:
            for layer in self._layers.values():
                layer.new = None
            raise
        finally:
            self._is_writing = False
        for layer in self._layers.values():
            layer.append(self._pass_book.held.shape[1], self._limit)
        gone = F.pad(~self._pass_book.held, (self.book.held.shape[1], 0))  # what nobody may attend to does not enter
        self.book = self.book.appended(replace(self._pass_book, held=torch.ones_like(self._pass_book.held)))
        self.frames = self.frames + self._pass_frames
        self.next_frame += len(self._pass_frames)
        self._is_cut = False
        self._changed()
        self.drop(gone)

    def forget_prompt(self) -> None:
        """The prompt changed: project it again."""
        for layer in self._layers.values():
            layer.prompt = None

    def state_dict(self) -> dict:
        """The context between two chunks: plain values and tensors on the CPU."""
        layers = [layer for _, layer in sorted(self._layers.items()) if layer.key is not None]
        return {
            "frames": list(self.frames),
            "next_frame": self.next_frame,
            "book": [self.book.frame, self.book.token, self.book.held, self.book.log_weight],
            "layers_at_home": [layer.saved() for layer in layers],
            "devices": [str(layer.key.device) for layer in layers],
        }

    def load_state_dict(self, state: dict) -> None:
        self.frames, self.next_frame = list(state["frames"]), state["next_frame"]
        self.book = TokenBook(*state["book"])
        self._layers = {}
        for index, tables in enumerate(state.get("layers_at_home", state.get("layers"))):
            context = LayerContext(*tables)
            if "devices" in state:
                device = state["devices"][index]
                context = LayerContext(*(None if each is None else each.to(device) for each in tables))
            else:  # of a version that held keys as they were projected
                context.key = rotate(context.key, *self._book_angles(context.key)).to(context.value.dtype)
            self.layer(index).put(context)
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
        self._ready_for = 0

    @contextmanager
    def only(self, videos: Iterable[int]) -> Iterator[None]:
        """Read for some videos of the batch: the forwards inside carry their rows alone."""
        videos = list(videos)
        self._videos = videos if len(videos) < self.num_videos else None
        self._ready_for = 0
        try:
            yield
        finally:
            self._videos = None
            self._ready_for = 0

    def prepare(self, num_rows: int, device: torch.device) -> None:
        """Before the first forward of a pass with `num_rows`: what its layers have in common, and what each reads."""
        if self._ready_for == num_rows:
            return
        # Distances alone count: everything is moved, so that the pass stands at its own frames.
        view, moved = self._view, self._pass_frames[0] - self._view.own_positions[0]
        own = [position + moved for position in view.own_positions]
        self._key_angles = self._query_angles = self._pass_angles(own, device)
        if view.query_positions is not None:
            self._query_angles = self._pass_angles([position + moved for position in view.query_positions], device)
        self._home_angles = None if own == self._pass_frames else self._pass_angles(self._pass_frames, device)
        book, index, columns, start = self._reading()
        mask = self._make_mask(book, index, num_rows)
        self.groups = [] if mask is None or mask.is_floating_point() else group_by_length(mask[:, 0, 0], device)
        self._mask = None if mask is None else mask.to(device)
        turn = self._turn(torch.tensor([*view.positions, 0])[index] + moved - book.frame, book, device)
        alone = self._videos is None or len(self._videos) == 1  # else the rows that are read are copied at each pass
        room = self._pass_book.held.shape[1] if columns is None and alone else 0
        for layer in self._stored():
            first = layer.num_rows - self._num_branches(num_rows) * self.num_videos
            rows = slice(first if room else 0, None)
            if room and self._videos is not None:
                rows = slice(first + self._videos[0], None, self.num_videos)
            by_row = None if columns is None else self._by_row(columns, layer).to(layer.key.device)
            self._arrangement = Arrangement(room, self._limit, start, by_row, turn, rows)
            layer.arrange(self._arrangement)
        self._ready_for = num_rows

    def update(
        self, layer: int | LayerStore, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put the tokens of the pass behind the past and return what its queries attend to, until the next pass.

        Args:
            layer (`int` or [`LayerStore`]): index of the transformer block, or what `layer` gives for it.
            key (`torch.Tensor`), value (`torch.Tensor`): of the pass, unrotated, (rows, seq, heads, head_dim).
            query (`torch.Tensor`, *optional*): the same, for layouts that rewrite the past by what is asked for.

        Returns:
            `tuple`: rotated keys and values, (rows, read + seq, heads, head_dim), and a mask, (rows, 1, 1, read + seq):
            `None` where every row reads all of them alike, boolean where some are padding, and what is added to the
            scores where the view weights its frames.
        """
        layer = self.layer(layer) if isinstance(layer, int) else layer
        if self._ready_for != len(key):
            self.prepare(len(key), key.device)
        if self._has_hooks:
            self._rewrite(layer, query)
        apart = layer.keys is None or key.requires_grad  # not in one piece of memory, which no gradient goes through
        if (apart or self._home_angles is not None) and self._is_writing:
            home = self._key_angles if self._home_angles is None else self._home_angles
            layer.new = rotate(key, *home).to(value.dtype), value
        key = rotate(key, *self._key_angles).to(value.dtype)
        if not apart:
            num_past = layer.keys.shape[1] - key.shape[1]
            layer.keys[:, num_past:], layer.values[:, num_past:] = key, value
            return layer.keys, layer.values, self._mask
        if layer.past is None:
            return key, value, self._mask
        past = layer.past if layer.keys is not None else [self._rows(each, len(key)) for each in layer.past]
        return *(torch.cat([old, new], dim=1) for old, new in zip(past, (key, value))), self._mask

    def rotate_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries of the pass at hand, (rows, seq, heads, head_dim), at their positions, in fp32."""
        if self._ready_for != len(query):
            self.prepare(len(query), query.device)
        return rotate(query, *self._query_angles)

    def prompt(
        self, layer: LayerStore, num_rows: int, project: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention keys and values of a layer for the rows at hand, projected once for a prompt, (rows, text, heads,
        head_dim)."""
        known = 0 if layer.prompt is None else len(layer.prompt[0])
        if known < self._num_branches(num_rows) * self.num_videos:
            with torch.no_grad():  # a prompt is no function of the latents
                projected = project()
            if self._videos is not None:
                return projected
            layer.prompt = projected
        key, value = layer.prompt
        return self._rows(key, num_rows), self._rows(value, num_rows)

    # 3. Inside

    def _stored(self) -> list[LayerStore]:
        """The layers that hold something."""
        return [layer for layer in self._layers.values() if layer.key is not None]

    @torch.compiler.disable
    def _rewrite(self, layer: LayerStore, query: torch.Tensor | None) -> None:
        """Let the layout rewrite what a layer holds before the first pass of a chunk, and before its commit, read it."""
        due = ["before_chunk"] * (not layer.is_begun) + ["before_commit"] * self._is_writing
        layer.is_begun = True
        hooks = [hook for hook in (getattr(self.layout, name, None) for name in due) if hook is not None]
        for hook in hooks if layer.key is not None else ():
            past, new = layer.at_home(), list(self._pass_frames)
            home, (cos, sin) = past.key, self._book_angles(past.key)
            projected = past.key = rotate(home, cos, -sin)
            rewrite_memory(hook, past, self.book, list(self.frames), new, query, self.places, self.rope_dims)
            same = (past.key == projected).flatten(2).all(dim=-1)[:, :, None, None]
            past.key = home.where(same, rotate(past.key, cos, sin).to(home.dtype))  # what stays is not rounded again
            layer.put(past)
            layer.arrange(self._arrangement)

    def _sink(self) -> torch.Tensor:
        """The frames that the layout saves from eviction."""
        sink = getattr(self.layout, "sink", None)
        return torch.tensor([] if sink is None else sink(list(self.frames)), dtype=torch.long)

    def _changed(self) -> None:
        self.version += 1
        self._ready_for = 0

    def _by_row(self, table: torch.Tensor, layer: LayerStore) -> torch.Tensor:
        """A table by video as a table by row of a layer: (B, ...) -> (branches * B, ...)."""
        return table.repeat(layer.num_rows // self.num_videos, *[1] * (table.ndim - 1))

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

    def _reading(self) -> tuple[TokenBook, torch.Tensor, torch.Tensor | None, int]:
        """What the pass at hand reads of the past: its book, the index in the view of each token's frame, (B, tokens); and
        the columns of memory, or `None` and the first of them, where all behind that are read, in whatever order."""
        frames, book = self._view.frames, self.book
        index = torch.cat([self._order(places) for places in self._places(frames)], dim=1)
        read, num_held = index < len(frames), book.held.shape[1]
        start = int(read.any(dim=0).byte().argmax()) if read.any() else num_held
        if index.shape[1] == num_held and torch.equal(read[:, start:], book.held[:, start:]):
            return book.since(start), index[:, start:], None, start
        taken = index.argsort(dim=1, stable=True)[:, : int(read.sum(dim=1).max())]
        columns = taken % num_held
        book = replace(book.taken(columns, book.held), held=read.gather(1, taken))
        return book, index.gather(1, taken), columns, 0

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

    def _make_mask(self, book: TokenBook, index: torch.Tensor, num_rows: int) -> torch.Tensor | None:
        """What the pass at hand may attend to, (rows, 1, 1, keys), where that is not all alike."""
        mask = torch.cat([book.held, self._pass_book.held], dim=1)
        of_frames, both = self._view.log_weights, book.appended(self._pass_book).log_weight
        if of_frames is not None or both is not None:
            weights = torch.zeros(mask.shape, dtype=torch.float32) if both is None else both
            if of_frames is not None:
                of_tokens = torch.tensor([*of_frames, 0.0], dtype=torch.float32)[index]
                weights = weights + F.pad(of_tokens, (0, self._pass_book.held.shape[1]))
            mask = weights.masked_fill(~mask, -torch.inf)
        elif mask.all():
            return None
        mask = mask if self._videos is None else mask[self._videos]
        return mask.repeat(num_rows // len(mask), 1)[:, None, None, :]

    def _turn(self, way: torch.Tensor, book: TokenBook, device: torch.device) -> tuple | None:
        """How keys get from home to where they are read, `way` latent frames on, (B, tokens): up to the last that moves."""
        way = way.where(book.held, 0)
        if not way.any():
            return None
        num_tokens = int(way.any(dim=0).nonzero().max()) + 1
        way = way[:1, :num_tokens] if (way == way[:1]).all() else self._by_row(way[:, :num_tokens], self._stored()[0])
        return num_tokens, *rotary_angles(way, torch.zeros(*way.shape, 0), self.rope_dims[:1], device)

    def _pass_angles(self, positions: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the tokens of the pass, whose frames stand at `positions`."""
        position = torch.tensor(positions)[self._pass_book.frame[:1] - self.next_frame]
        return self._rotary_angles(position, self._pass_book.token[:1], device)

    def _book_angles(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of all that is held, at home."""
        frame, token = self.book.frame, self.book.token
        if self.book.is_shared():
            frame, token = frame[:1], token[:1]
        else:
            frame, token = (table.repeat(len(key) // self.num_videos, 1) for table in (frame, token))
        return self._rotary_angles(frame, token, key.device)

    def _rotary_angles(
        self, position: torch.Tensor, token: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine at (temporal position, token), both (batch, seq) -> (batch, seq, 1, head_dim / 2)."""
        return rotary_angles(position, self.places[token], self.rope_dims, device)
