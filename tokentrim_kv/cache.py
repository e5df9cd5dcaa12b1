# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rolling KV cache of a causal rollout: owns keys, values and token positions. It obeys the views of a layout and
knows no window."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..tokentrim_checks import check, check_saved_frames
from ..tokentrim_views.layout import Layout, Pass, View, check_frames, check_view
from ..tokentrim_views.rope import RotaryGrid, grid_places, rotate
from .book import Compaction, TokenBook
from .reading import PassTokens, Reading, book_angles, read_pass
from .rewriting import LayerContext, Rewriter
from .rows import BatchRows
from .store import LayerStore


class RollingKVCache:
    """Keys and values of the past, (rows, held tokens, heads, head_dim) in each layer.

    Grows by the frames of each `writing` pass; `make_room` drops what the layout does not keep. Keys are held once,
    rotated at their latent frames. Attention depends on distances alone, so that only keys whose distance from the present
    changes, such as a sink's, are rotated again, and no video is too long for a table of angles. The tokens of a pass are
    put directly behind the past, so that attention reads both in one piece. Evicted tokens leave memory; rows that hold
    fewer tokens than the longest are padded, and the padding is masked.

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
        reading ([`Reading`], *optional*): what the current pass reads; `None` when it has to be determined anew.
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
        self.layout = Layout() if layout is None else layout
        self.num_protected_frames = max(num_protected_frames, self.layout.num_sink_frames)
        window_size = self.layout.window_size
        self._limit = None if window_size is None else window_size * self.tokens_per_frame
        self.version = 0
        self.is_writing = False
        self.frames: list[int] = []
        self.next_frame = 0
        self.book = TokenBook.of_frames([], self.tokens_per_frame, num_videos)
        self._layers: dict[int, LayerStore] = {}
        self._is_cut = False  # whether the next chunk follows a cut
        self._pass = PassTokens([], self.book, View([], [], []))
        self.rows = BatchRows(num_videos)
        self.reading: Reading | None = (
            None  # by the pass, of the book and the rows; `None` once one of them has changed
        )

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def layer(self, index: int) -> LayerStore:
        """The keys and values of a layer."""
        return self._layers.setdefault(index, LayerStore(self._limit))

    def newest_values(self) -> torch.Tensor:
        """The last layer's values of all held tokens, (rows, tokens, heads, head_dim)."""
        layer = self._layers[max(self._layers)]
        return layer.value[:, : layer.length]

    # 1. What is held, leaves and enters

    def make_room(self, num_frames: int) -> None:
        """Before a chunk of `num_frames` latent frames: drop the frames that the layout does not keep."""
        new = list(range(self.next_frame, self.next_frame + num_frames))
        self.retain(check_frames("keep", self.layout.keep(list(self.frames), new), self.layout))
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
        """Hard pruning (eq. 9, 10): remove grid tokens from all unprotected frames; with a `weight`, soft pruning: they
        stay, and their weight is multiplied by it.

        Args:
            tokens (`dict`): grid indices for each video.
            since_frame (`int`): the first latent frame that loses them.
            weight (`float`): 0 removes them.

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
        """After a change of prompt: drop what the layout does not keep through it. With `is_cut`, the next chunk is placed
        apart from the past."""
        self.retain(check_frames("flush", self.layout.flush(list(self.frames)), self.layout))
        self._is_cut = is_cut

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
            "book": [self.book.frame, self.book.token, self.book.held, self.book.log_weight],
            "layers_at_home": [layer.saved() for layer in layers],  # the name that saved runs have
            "devices": [str(layer.key.device) for layer in layers],
        }

    def load_state_dict(self, state: dict, num_rows: int, num_layers: int, head: tuple[int, int]) -> None:
        """Continue from a saved context, of layers with (heads, head_dim) and forwards of `num_rows`.

        Raises:
            `ValueError`: its tables are not those of such a model.
        """
        frames, tables = state["frames"], state["layers_at_home"]
        book = TokenBook(*state["book"])
        check_saved_frames("frames of the context", frames, state["next_frame"])
        book.check(self.num_videos, len(self.rope.places), frames)
        num_saved, num_tokens = len(tables), book.held.shape[1]
        valid = f"of a run of the same call, with a context of {num_layers} layers"
        check(num_saved == len(state["devices"]) == (num_layers if frames or tables else 0), "state", num_saved, valid)
        layers = [LayerContext(*each) for each in tables]
        for layer in layers:
            layer.check(num_rows, num_tokens, head)
        self.frames, self.next_frame, self.book, self._layers = list(frames), state["next_frame"], book, {}
        self._is_cut = False
        for index, (layer, device) in enumerate(zip(layers, state["devices"])):
            self.layer(index).put(layer.to(device))
        self._changed()

    # 2. What attention reads

    def begin_pass(self, num_frames: int, pass_: Pass, book: TokenBook | None = None) -> None:
        """The next forwards carry the `num_frames` latent frames after the context, all their tokens or those of
        `book`."""
        frames = list(range(self.next_frame, self.next_frame + num_frames))
        view = self.layout.view(list(self.frames), list(frames), replace(pass_, is_cut=self._is_cut))
        if book is None and (frames, view) == (self._pass.frames, self._pass.view):
            return
        check_view(view, self.layout, self.frames, frames)
        book = TokenBook.of_frames(frames, self.tokens_per_frame, self.num_videos) if book is None else book
        self._pass, self.reading = PassTokens(frames, book, view), None

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
            key (`torch.Tensor`), value (`torch.Tensor`): of the pass, not rotated, (rows, seq, heads, head_dim).
            query (`torch.Tensor`, *optional*): the same, for layouts whose hooks look at queries.

        Returns:
            `tuple`: rotated keys and values, (rows, read + seq, heads, head_dim), and a mask, (rows, 1, 1, read + seq):
            `None` if every row reads all of them alike, boolean if some are padding, and what is added to the scores if
            the view weights its frames.
        """
        layer = self.layer(layer) if isinstance(layer, int) else layer
        if self.reading is None or self.reading.num_rows != len(key):
            self.prepare(len(key), key.device)
        if self.layout.before_chunk is not None or self.layout.before_commit is not None:
            self._rewrite(layer, query)
        return *layer.join(key, value, self.reading, self.is_writing), self.reading.mask

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

    def _changed(self) -> None:
        self.version += 1
        self.reading = None

    @torch.compiler.disable
    def _rewrite(self, layer: LayerStore, query: torch.Tensor | None) -> None:
        """Let the layout rewrite what a layer holds before the first pass of a chunk, and before its commit, read it."""
        layout = self.layout
        due = [None if layer.is_begun else layout.before_chunk, layout.before_commit if self.is_writing else None]
        layer.is_begun = True
        for hook in due if layer.key is not None else ():
            if hook is not None:
                past, new = layer.context(), list(self._pass.frames)
                angles = book_angles(self.book, layer.num_rows, self.rope, past.key.device)
                Rewriter(self.book, list(self.frames), new, self.rope, angles).rewrite(hook, past, query)
                layer.put(past)
                layer.arrange(self.reading)
