# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rolling KV cache of a causal rollout: owns keys, values and token positions. It obeys the views of a layout and
knows no window."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..tokentrim_views.layout import Layout
from ..tokentrim_views.rope import RotaryGrid, grid_places, rotate
from ..tokentrim_views.view import Pass, RunHistory, View, check_frames, check_views
from .book import Compaction, TokenBook
from .hooks import LayoutHooks
from .reading import PassTokens, Reading, read_pass
from .rewriting import read_context
from .rows import BatchRows
from .store import LayerStore


class RollingKVCache:
    """Keys and values of the past, (rows, held tokens, heads, head_dim) in each layer.

    Grows by the frames of each `writing` pass; `make_room` drops what the layout does not keep. Keys are held once,
    rotated at their latent frames. Attention depends on distances alone, so that only keys whose distance from the present
    changes, such as a sink's, are rotated again. The tokens of a pass are put directly behind the past, so that attention
    reads both in one piece. Evicted tokens leave memory; shorter rows are padded, and the padding is masked.

    Args:
        grid (`tuple[int, int]`): tokens of a latent frame, (height, width).
        rope_dims (`tuple[int, int, int]`): rotary dimensions of a head for (frame, height, width).
        num_videos (`int`): B.
        layout ([`Layout`], *optional*): what stays and what is read; by default all of it, at absolute positions.
        num_protected_frames (`int`): first latent frames that eviction leaves alone, in addition to the layout's sink.
        places (`torch.Tensor`, *optional*): row and column of every token, (tokens, 2); by default the grid's.

    Attributes:
        frames (`list[int]`): latent frames of the context, ascending, including frames without tokens.
        next_frame (`int`): the latent frame after the context.
        version (`int`): changes whenever what attention reads of the past changes.
        is_writing (`bool`): whether the current pass is a commit.
        rows ([`BatchRows`]): of the batch, that the current forwards carry.
        reading ([`Reading`], *optional*): what the current pass reads; `None` once the book or the rows have changed.
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
        self.rope = RotaryGrid(grid_places(grid) if places is None else places, rope_dims)
        self.num_videos = num_videos
        self._given = Layout() if layout is None else layout
        self.history = RunHistory()
        self.layout = self._given.after(self.history)
        self.num_protected_frames = max(num_protected_frames, self.layout.num_sink_frames)
        self._limit = (self.layout.window_size or 0) * self.tokens_per_frame or None
        self.version = 0
        self.is_writing = False
        self.frames: list[int] = []
        self.next_frame = 0
        self.book = TokenBook.of_frames([], self.tokens_per_frame, num_videos)
        self._layers: dict[int, LayerStore] = {}
        self._is_cut = False  # whether the next chunk follows a cut
        self._pass = PassTokens([], self.book, [View([], [], [])])
        self._surveys: list[list[torch.Tensor]] = []  # by row and layer, of the current chunk
        self.rows = BatchRows(num_videos)
        self.reading: Reading | None = None

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def layer(self, index: int) -> LayerStore:
        """The keys and values of a layer."""
        return self._layers.setdefault(index, LayerStore(self._limit, index))

    def newest_values(self) -> torch.Tensor:
        """The last layer's values of all held tokens, (rows, tokens, heads, head_dim)."""
        return (layer := self._layers[max(self._layers)]).value[:, : layer.length]

    # 1. What is held, leaves and enters

    def make_room(self, num_frames: int) -> None:
        """Before a chunk of `num_frames` latent frames: drop the frames that the layout does not keep."""
        new = list(range(self.next_frame, self.next_frame + num_frames))
        self.retain(check_frames("keep", self.layout.keep(list(self.frames), new), self.layout))
        if self.history.notes:
            notes = {frame: note for frame, note in self.history.notes.items() if frame in self.frames}
            self._remember(self.history.shots, notes)
        self._surveys = []
        for layer in self._layers.values():
            layer.is_begun = False

    def retain(self, frames: Iterable[int]) -> None:
        """Drop all frames but these."""
        kept = set(frames)
        if kept != set(self.frames):
            self.drop(~torch.isin(self.book.frame, torch.tensor(sorted(kept), dtype=torch.long)))
            self.frames = [frame for frame in self.frames if frame in kept]
        self.reading = None

    def evict(
        self, tokens: Mapping[int, Iterable[int]], since_frame: int = 0, weight: float = 0.0
    ) -> dict[int, list[int]]:
        """Hard pruning (eq. 9, 10): remove grid tokens from all unprotected frames.

        Args:
            tokens (`dict`): grid indices for each video.
            since_frame (`int`): the first latent frame that loses them.
            weight (`float`): above 0, they stay, and their weight is multiplied by it (soft pruning).

        Returns:
            `dict[int, list[int]]`: the evicted grid tokens of each video; videos that lost none are left out.
        """
        first = max(since_frame, self.num_protected_frames)
        named = self.book.named(tokens, first, self.layout.sink(list(self.frames)))
        evicted = {
            video: self.book.token[video][named[video]].unique().tolist() for video in tokens if named[video].any()
        }
        if weight == 0:
            self.drop(named)
        elif evicted:
            self.book = self.book.weighted(named, weight)
            self._changed()
        return evicted

    def drop(self, gone: torch.Tensor) -> None:
        """Remove the tokens of the book where `gone`, (B, tokens), is True; the others move to the front of each row."""
        held = self.book.held & ~gone
        if torch.equal(held, self.book.held):
            return
        compaction = Compaction.of(held)
        for layer in self._layers.values():
            layer.take(compaction, self.rows)
        self.book = self.book.taken(compaction.columns, held)
        self._changed()

    def truncate(self, frame: int) -> None:
        """Remove the latent frames from `frame` on: the next pass carries them again."""
        self.drop(self.book.frame >= frame)
        self.frames, self.next_frame = [each for each in self.frames if each < frame], frame

    def flush(self, is_cut: bool = False) -> None:
        """After a change of prompt: drop what the layout does not keep. With `is_cut`, the next chunk stands apart."""
        self.retain(check_frames("flush", self.layout.flush(list(self.frames)), self.layout))
        self._is_cut = is_cut

    def begin_shot(self) -> None:
        """After a change of prompt: the next chunk is the first of a shot."""
        self._remember([*self.history.shots, self.next_frame], self.history.notes)

    def committed(self, latents: torch.Tensor) -> None:
        """Let the layout remember something of the clean latents, (B, C, frames, H, W), of the chunk that enters next."""
        frames = list(range(self.next_frame, self.next_frame + latents.shape[2]))
        notes = self.layout.committed(frames, latents)
        if notes is not None:
            new = dict(zip(frames, notes.to("cpu", copy=True).unbind(dim=1)))
            self._remember(self.history.shots, {**self.history.notes, **new})

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A commit: keys and values of the forward inside become context, in all layers or in none."""
        self.is_writing = True
        try:
            yield
        except BaseException:
            for layer in self._layers.values():
                layer.new = None
            raise
        finally:
            self.is_writing = False
        new, num_held = self._pass.book, self.book.held.shape[1]
        for layer in self._layers.values():
            layer.append(new.held.shape[1])
        self.book = self.book.appended(replace(new, held=torch.ones_like(new.held)))
        self.frames = self.frames + self._pass.frames
        self.next_frame += len(self._pass.frames)
        self._is_cut = False
        self._changed()
        self.drop(F.pad(~new.held, (num_held, 0)))  # what no query may attend to does not enter

    def state_dict(self) -> dict:
        """The context between two chunks: plain values and tensors on the CPU."""
        layers = [layer for _, layer in sorted(self._layers.items()) if layer.key is not None]
        return {
            "frames": list(self.frames),
            "next_frame": self.next_frame,
            "shots": list(self.history.shots),
            "notes": [[frame, note] for frame, note in self.history.notes.items()],
            "book": [self.book.frame, self.book.token, self.book.held, self.book.log_weight],
            "layers_at_home": [layer.saved() for layer in layers],  # the name that saved runs have
            "devices": [str(layer.key.device) for layer in layers],
        }

    def load_state_dict(self, state: dict, num_rows: int, num_layers: int, head: tuple[int, int]) -> None:
        """Continue from a saved context, of layers with (heads, head_dim) and forwards of `num_rows`; refuse others."""
        num_places = len(self.rope.places)
        self.book, layers, history = read_context(state, self.num_videos, num_places, num_rows, num_layers, head)
        self.frames, self.next_frame = list(state["frames"]), state["next_frame"]
        self._layers, self._is_cut = {}, False
        self._remember(*history)
        for index, layer in enumerate(layers):
            self.layer(index).put(layer)
        self._changed()

    # 2. What attention reads

    def begin_pass(self, num_frames: int, pass_: Pass, book: TokenBook | None = None) -> None:
        """The next forwards carry the `num_frames` frames after the context, all their tokens or those of `book`."""
        frames = list(range(self.next_frame, self.next_frame + num_frames))
        views = self.layout.view(list(self.frames), list(frames), replace(pass_, is_cut=self._is_cut))
        views = views if isinstance(views, list) else [views]
        if book is None and self._pass.is_same(frames, views, pass_.chunk_sizes):
            return
        check_views(views, self.layout, self.frames, frames, self.num_videos)
        book = TokenBook.of_frames(frames, self.tokens_per_frame, self.num_videos) if book is None else book
        self._pass, self.reading = PassTokens(frames, book, views, pass_.chunk_sizes), None

    @contextmanager
    def only(self, videos: Iterable[int]) -> Iterator[None]:
        """The forwards inside carry the rows of some videos of the batch alone."""
        videos = list(videos)
        self.rows, self.reading = BatchRows(self.num_videos, videos if len(videos) < self.num_videos else None), None
        try:
            yield
        finally:
            self.rows, self.reading = BatchRows(self.num_videos), None

    def prepare(self, num_rows: int, device: torch.device) -> None:
        """Before the first forward of a pass with `num_rows`: what its layers have in common, and what each reads."""
        if self.reading is not None and self.reading.num_rows == num_rows:
            return
        self.reading = read_pass(self.book, self._pass, self.rope, self.rows, num_rows, device)
        for layer in self._layers.values():
            layer.arrange(self.reading)

    def update(
        self, layer: int | LayerStore, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put the tokens of the pass behind the past and return what its queries attend to, until the next pass.

        Args:
            layer (`int` or [`LayerStore`]): index of the transformer block, or what `layer` gives for it.
            key, value, query (`torch.Tensor`): of the pass, not rotated, (rows, seq, heads, head_dim); queries for hooks.

        Returns:
            `tuple`: rotated keys and values, (rows, read + seq, heads, head_dim), and a mask, (rows, 1, 1, read + seq),
            boolean or added to the scores; `None` if every row reads all of them alike.
        """
        layer = self.layer(layer) if isinstance(layer, int) else layer
        if self.reading is None or self.reading.num_rows != len(key):
            self.prepare(len(key), key.device)
        if self.layout.before_chunk is not None or self.layout.before_commit is not None:
            self._rewrite(layer, query)
        return *layer.join(key, value, self.reading, self.is_writing), self.reading.mask

    def update_parts(
        self, layer: LayerStore, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor
    ) -> list[tuple[Reading, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As `update`, where queries or heads read different frames: for each part its reading, queries, keys, values."""
        if self.layout.before_chunk is not None or self.layout.before_commit is not None:
            self._rewrite(layer, query)
        return layer.join_parts(key, value, query, self.reading, self.is_writing)

    def rotate_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries of the current pass, (rows, seq, heads, head_dim), rotated at their positions, in fp32."""
        if self.reading is None or self.reading.num_rows != len(query):
            self.prepare(len(query), query.device)
        return rotate(query, *self.reading.query_angles)

    def forget_prompt(self) -> None:
        """The prompt changed: project it again."""
        for layer in self._layers.values():
            layer.prompt = None

    # 3. Inside

    def _remember(self, shots: list[int], notes: Mapping[int, torch.Tensor]) -> None:
        self.history = RunHistory(shots, notes)
        self.layout = self._given.after(self.history)

    def _changed(self) -> None:
        self.version += 1
        self.reading = None

    @torch.compiler.disable
    def _rewrite(self, layer: LayerStore, query: torch.Tensor | None) -> None:
        """Let the layout rewrite what a layer holds, where one of its hooks is due."""
        past, new = list(self.frames), list(self._pass.frames)
        hooks = LayoutHooks(self.layout, self.book, past, new, self.rope, self._surveys)
        if hooks.run(layer, list(self._layers.values()), query, self.is_writing):
            layer.arrange(self.reading)
