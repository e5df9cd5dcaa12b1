# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rolling KV cache of a causal Wan rollout: the one owner of keys, values and token positions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


ROPE_THETA = 10000.0  # `WanRotaryPosEmbed`'s default, which the model neither changes nor keeps


def rotate(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (batch, seq, heads, head_dim) by (batch or 1, seq, 1, head_dim / 2), in fp32."""
    even, odd = hidden_states.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _front(held: torch.Tensor) -> torch.Tensor:
    """Columns that bring the True ones of (B, tokens) to the front of each row, in order, as many as the longest has."""
    return held.byte().argsort(dim=1, descending=True, stable=True)[:, : int(held.sum(dim=1).max())]


def _take(by_token: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Tokens of (rows, tokens, heads, head_dim) by `columns`, (rows, taken)."""
    return by_token[torch.arange(len(columns), device=columns.device)[:, None], columns]


@dataclass
class _Layer:
    """One layer's context, (rows, tokens, heads, head_dim): keys as projected, and what the pass at hand reads."""

    key: torch.Tensor
    value: torch.Tensor
    read: tuple[torch.Tensor, torch.Tensor] | None = None  # rotated keys, and values


class RollingKVCache:
    """Keys and values of the past, (rows, held tokens, heads, head_dim) in each layer.

    Grows by a chunk at each `writing` pass; with a window it holds at most `window_size` latent frames less the
    current chunk. A *row* is one sequence of the transformer's batch: video v is rows v, v + B, ... (guidance
    branches). Keys are kept without rotary embedding and a second time rotated for the chunk at hand, so that their
    positions may move and no length meets the end of a table. Evicted tokens are gone from memory; rows that hold fewer tokens than the longest
    are padded and the padding masked.

    Args:
        grid (`tuple[int, int]`): tokens of a latent frame, (height, width).
        rope_dims (`tuple[int, int, int]`): rotary dimensions of a head for (frame, height, width).
        num_videos (`int`): B.
        window_size (`int`, *optional*): latent frames attended in all, the current chunk and the sink included.
        num_sink_frames (`int`): first latent frames that never leave: neither by the window nor by eviction.
        relative_positions (`bool`): count positions inside the window, the sink directly before the recent frames,
            instead of from the start of the video.
        sink_in_context_pass (`bool`): whether a context pass reads the sink too, at the price of as many recent frames.
        num_protected_frames (`int`): first latent frames that eviction leaves alone, beside the sink.

    Attributes:
        version (`int`): changes whenever what attention reads of the past changes.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        rope_dims: tuple[int, int, int],
        num_videos: int,
        window_size: int | None = None,
        num_sink_frames: int = 0,
        relative_positions: bool = False,
        sink_in_context_pass: bool = True,
        num_protected_frames: int = 0,
    ):
        self.grid = grid
        self.rope_dims = rope_dims
        self.num_videos = num_videos
        self.window_size = window_size
        self.num_sink_frames = num_sink_frames
        self.relative_positions = relative_positions
        self.sink_in_context_pass = sink_in_context_pass
        self.num_protected_frames = max(num_protected_frames, num_sink_frames)
        self.version = 0
        self.reset()

    # 1. What the past is

    def reset(self) -> None:
        """Forget everything."""
        self.frames: list[int] = []  # latent frames of the context, ascending, emptied ones included
        self.next_frame = 0
        self._pass_frames: list[int] = []  # latent frames of the pass at hand
        self._pass_sink = self.num_sink_frames  # how many of the first frames it reads
        self._layers: dict[int, _Layer] = {}
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pending: dict[int, _Layer] | None = None
        self._videos: list[int] | None = None
        # One table for all layers: which (latent frame, grid index) each held token is, (B, held tokens).
        self._frame = torch.zeros(self.num_videos, 0, dtype=torch.long)
        self._token = torch.zeros(self.num_videos, 0, dtype=torch.long)
        self._held = torch.zeros(self.num_videos, 0, dtype=torch.bool)  # False is padding
        self._memo: dict[str, tuple[torch.Tensor, ...]] = {}  # what follows from the tables, until they change
        self._changed()

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def held_tokens(self, video: int = 0) -> list[tuple[int, int]]:
        """The (latent frame, grid index) of every token that `video` can attend to, in attention's order."""
        held = self._held[video]
        return list(zip(self._frame[video][held].tolist(), self._token[video][held].tolist()))

    # 2. What changes it

    def begin_chunk(self, num_frames: int) -> None:
        """Make room for a chunk of `num_frames` latent frames: what no pass will read any more leaves, but the sink."""
        if self.window_size is not None:
            oldest = self._oldest_recent(num_frames, self.num_sink_frames * self.sink_in_context_pass)
            self._keep((self._frame >= oldest) | (self._frame < self.num_sink_frames))
            self.frames = [frame for frame in self.frames if frame >= oldest or frame < self.num_sink_frames]
        self._forget_views()
        self.begin_pass(num_frames)

    def begin_pass(self, num_frames: int) -> None:
        """The next forwards carry the `num_frames` latent frames after the context, of one chunk or of several."""
        frames = list(range(self.next_frame, self.next_frame + num_frames))
        sink = self.num_sink_frames if self._pending is None or self.sink_in_context_pass else 0
        if (frames, sink) != (self._pass_frames, self._pass_sink):
            self._pass_frames, self._pass_sink = frames, sink
            self._forget_views()

    def evict(self, tokens: Mapping[int, Iterable[int]], since_frame: int = 0) -> None:
        """Hard pruning (eq. 9, 10): `tokens[video]` are grid indices to remove from all its unprotected frames, or from
        those since a certain one."""
        keep, first = torch.ones_like(self._held), max(since_frame, self.num_protected_frames)
        for video, indices in tokens.items():
            condemned = torch.isin(self._token[video], torch.tensor(sorted(indices), dtype=torch.long))
            keep[video] = ~condemned | (self._frame[video] < first)
        self._keep(keep)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The context pass: keys and values of the forward inside become context, all layers or none."""
        self._pending = {}
        try:
            yield
            pending = self._pending
        finally:
            self._pending = None
        for index, new in pending.items():
            old = self._layers.get(index)
            if old is not None:
                new = _Layer(torch.cat([old.key, new.key], dim=1), torch.cat([old.value, new.value], dim=1))
            self._layers[index] = new
        frame, token = (table.expand(self.num_videos, -1) for table in self._pass_tables())
        self._frame = torch.cat([self._frame, frame], dim=1)
        self._token = torch.cat([self._token, token], dim=1)
        self._held = torch.cat([self._held, torch.ones_like(frame, dtype=torch.bool)], dim=1)
        self.frames += self._pass_frames
        self.next_frame += len(self._pass_frames)
        self._changed()

    # 3. What attention reads

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
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put the current chunk behind the past and return what its queries attend to.

        Args:
            layer (`int`): index of the transformer block.
            key (`torch.Tensor`), value (`torch.Tensor`): of the current chunk, unrotated, (rows, seq, heads, head_dim).

        Returns:
            `tuple`: rotated keys and values, (rows, held + seq, heads, head_dim), and a boolean mask
            (rows, 1, 1, held + seq), or `None` where every row holds as many tokens.
        """
        if self._pending is not None:
            self._pending[layer] = _Layer(key.to(value.dtype), value)
        key = self.rotate_chunk(key).to(value.dtype)
        past, mask = self._layers.get(layer), self._mask(len(key), key.device)
        if past is None or past.key.shape[1] == 0:
            return key, value, mask
        columns, cos, sin = self._view(past.key)
        if past.read is None:
            old_key, old_value = (old if columns is None else _take(old, columns) for old in (past.key, past.value))
            past.read = rotate(old_key, cos, sin).to(value.dtype), old_value
        keys, values = (torch.cat([self._rows(old), new], dim=1) for old, new in zip(past.read, (key, value)))
        return keys, values, mask

    def rotate_chunk(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rotary embedding at the positions of the pass at hand, (rows, seq, heads, head_dim), in fp32."""
        if "pass" not in self._memo:
            self._memo["pass"] = self._rotary_angles(*self._pass_tables(), hidden_states.device)
        return rotate(hidden_states, *self._memo["pass"])

    def prompt(
        self, layer: int, project: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention keys and values of `layer`, projected once for a prompt, (rows, text, heads, head_dim)."""
        if layer not in self._prompt:
            with torch.no_grad():  # a prompt is no function of the latents
                projected = project()
            if self._videos is not None:
                return projected
            self._prompt[layer] = projected
        key, value = self._prompt[layer]
        return self._rows(key), self._rows(value)

    def forget_prompt(self) -> None:
        """The prompt changed: project it again."""
        self._prompt.clear()

    # 4. Inside

    def _changed(self) -> None:
        self.version += 1
        self._forget_views()

    def _forget_views(self) -> None:
        """What was derived from the context or its positions no longer holds."""
        self._memo.clear()
        for layer in self._layers.values():
            layer.read = None

    def _keep(self, keep: torch.Tensor) -> None:
        """Drop the tokens where `keep`, (B, held tokens), is False: held tokens move to the front of each row."""
        held = self._held & keep
        if torch.equal(held, self._held):
            return
        columns = _front(held)
        self._frame, self._token, self._held = (x.gather(1, columns) for x in (self._frame, self._token, held))
        for layer in self._layers.values():
            of_rows = self._repeat(columns, layer.key.shape[0]).to(layer.key.device)
            layer.key, layer.value = _take(layer.key, of_rows), _take(layer.value, of_rows)
        self._changed()

    def _oldest_recent(self, num_frames: int, num_sink_frames: int) -> int:
        """The first frame of the past that the window leaves room for beside `num_frames` and the sink."""
        return self.next_frame - max(self.window_size - num_sink_frames - num_frames, 0)

    def _is_read(self, frame: torch.Tensor) -> torch.Tensor:
        """Which latent frames of the context the pass at hand reads."""
        if self.window_size is None:
            return torch.ones_like(frame, dtype=torch.bool)
        return (frame >= self._oldest_recent(len(self._pass_frames), self._pass_sink)) | (frame < self._pass_sink)

    def _repeat(self, table: torch.Tensor, num_rows: int) -> torch.Tensor:
        """A table by video as a table by row: (B, ...) -> (branches * B, ...)."""
        return table.repeat(num_rows // self.num_videos, *[1] * (table.ndim - 1))

    def _rows(self, by_row: torch.Tensor) -> torch.Tensor:
        """The rows of the videos that are being read."""
        if self._videos is None:
            return by_row
        starts = range(0, by_row.shape[0], self.num_videos)
        return by_row[[start + video for start in starts for video in self._videos]]

    def _pass_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(latent frame, grid index) of every token of the pass at hand, each (1, seq)."""
        frame = torch.tensor(self._pass_frames).repeat_interleave(self.tokens_per_frame)[None]
        return frame, torch.arange(self.tokens_per_frame).repeat(len(self._pass_frames))[None]

    def _pass_held(self) -> torch.Tensor:
        """Which tokens of the pass at hand may be attended to, (B, seq)."""
        return torch.ones(self.num_videos, self._pass_tables()[0].shape[1], dtype=torch.bool)

    def _place(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of a grid index."""
        return token // self.grid[1], token % self.grid[1]

    def _reading(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the pass at hand reads of the past, (B, tokens) each: frame, grid index, held; the columns, unless all."""
        if "reading" not in self._memo:
            frame, token, held, columns = self._frame, self._token, self._held & self._is_read(self._frame), None
            if not torch.equal(held, self._held):
                columns = _front(held)
                frame, token, held = (x.gather(1, columns) for x in (frame, token, held))
            self._memo["reading"] = (frame, token, held, columns)
        return self._memo["reading"]

    def _mask(self, num_rows: int, device: torch.device) -> torch.Tensor | None:
        """Which keys the `num_rows` at hand may attend to, (rows, 1, 1, keys), where that is not all."""
        if "mask" not in self._memo:
            held = torch.cat([self._reading()[2], self._pass_held()], dim=1)
            self._memo["mask"] = (None if held.all() else held.to(device),)
        (held,) = self._memo["mask"]
        if held is None:
            return None
        held = held if self._videos is None else held[self._videos]
        return held.repeat(num_rows // len(held), 1)[:, None, None, :]

    def _view(self, key: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The columns of `key` that the pass at hand reads, unless all; cosine and sine of their positions."""
        if "view" not in self._memo:
            frame, token, held, columns = self._reading()
            if columns is not None:
                columns = self._repeat(columns, key.shape[0]).to(key.device)
            if held.all() and (frame == frame[:1]).all() and (token == token[:1]).all():
                frame, token = frame[:1], token[:1]  # rows alike share one table
            else:
                frame, token = self._repeat(frame, key.shape[0]), self._repeat(token, key.shape[0])
            self._memo["view"] = (columns, *self._rotary_angles(frame, token, key.device))
        return self._memo["view"]

    def _rotary_angles(
        self, frame: torch.Tensor, token: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine at (latent frame, grid index), both (batch, seq) -> (batch, seq, 1, head_dim / 2)."""
        if self.relative_positions:
            past = torch.tensor(self.frames, dtype=torch.long)
            attended = torch.cat([past[self._is_read(past)], torch.tensor(self._pass_frames)])
            frame = torch.searchsorted(attended, frame)
        axes = (frame, *self._place(token))
        cos, sin = [], []
        for position, dim in zip(axes, self.rope_dims):
            frequencies = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            distinct, where = position.unique(return_inverse=True)
            angles, where = distinct[:, None] * frequencies, where.to(device)  # in float64: exact however far
            cos.append(angles.cos().float().to(device)[where])
            sin.append(angles.sin().float().to(device)[where])
        return torch.cat(cos, dim=-1)[:, :, None, :], torch.cat(sin, dim=-1)[:, :, None, :]
