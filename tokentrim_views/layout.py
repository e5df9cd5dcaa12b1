# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Which latent frames of the past a pass reads, and at which positions: pure functions of frame numbers."""

from collections.abc import Callable

import torch

from ..tokentrim_checks import check, check_bool, check_int
from .memory import Memory
from .view import Pass, RunHistory, View


CUT_JUMP = 45  # position of the chunk after a cut (Infinity-RoPE, arXiv 2511.20649)


Hook = Callable[[Memory, list[int], torch.Tensor], None]


class Layout:
    """Which latent frames of the past stay in memory, and which of them a pass reads. By default: all, at absolute
    positions.

    A layout overrides some of the verbs below. All but the hooks are pure functions of frame numbers: the same arguments
    always give the same result. Frames are numbered from the start of the video. A *pass* is a forward of the transformer
    over the frames `new`; `held` are the frames in memory, ascending.

    A layout that also rewrites keys and values defines hooks; they take `(memory, new, query)` and return nothing.
    `before_chunk` runs before the first pass over the frames `new` reads a layer, `before_commit` before their commit does.
    `memory` is the [`Memory`] of one video in one layer, which the hook changes in place; `query` holds the queries of the
    pass, (seq, heads, head_dim), not rotated. `survey(memory, new)` sees every layer before the first one is rewritten;
    what it returns is in `memory.surveys`.

    Attributes:
        window_size (`int`, *optional*): latent frames that attention spans at most; `None`: without bound.
        num_sink_frames (`int`): first latent frames that eviction leaves alone.
        one_chunk_a_pass (`bool`): whether it assumes that a pass carries one chunk, which excludes Rolling Forcing and
            AnyFlow-FAR.
        transitions (`tuple[str, ...]`): the prompt transitions that it supports.
        for_heads (`bool`): whether [`ByHead`] may give it to some of the heads.
        by_head (`bool`): whether heads read different frames.
        survey, before_chunk, before_commit (`Callable`, *optional*): the hooks.
    """

    window_size: int | None = None
    num_sink_frames: int = 0
    one_chunk_a_pass: bool = False
    transitions: tuple[str, ...] = ("keep", "recache", "flush", "cut")
    for_heads: bool = True
    by_head: bool = False
    survey: Callable[[Memory, list[int]], torch.Tensor] | None = None
    before_chunk: Hook | None = None
    before_commit: Hook | None = None

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        """Which frames stay in memory while a chunk is generated and committed.

        Args:
            held (`list[int]`): latent frames in memory.
            new (`list[int]`): latent frames of the chunk.

        Returns:
            `list[int]`: frames of `held`.
        """
        return held

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View | list[View]:
        """What a pass reads, and where it places what it reads and what it carries.

        Args:
            held (`list[int]`): latent frames in memory.
            new (`list[int]`): latent frames that the pass carries.
            pass_ ([`Pass`]): which kind of pass it is.

        Returns:
            [`View`] or `list`: of frames of `held`; several where queries or heads differ.
        """
        return View(held, held, new)

    def sink(self, held: list[int]) -> list[int]:
        """Which frames eviction leaves alone. By default the first `num_sink_frames`.

        Args:
            held (`list[int]`): latent frames in memory.

        Returns:
            `list[int]`: frames of `held`.
        """
        return [frame for frame in held if frame < self.num_sink_frames]

    def flush(self, held: list[int]) -> list[int]:
        """Which frames stay when the prompt changes and the context is flushed. By default the sink and the last two.

        Args:
            held (`list[int]`): latent frames in memory.

        Returns:
            `list[int]`: frames of `held`.
        """
        kept = {*self.sink(held), *held[-2:]}
        return [frame for frame in held if frame in kept]

    def recache(self, held: list[int]) -> tuple[list[int], list[int]]:
        """Which frames are encoded again when the prompt changes. By default all but a sink from which frames have left.

        Args:
            held (`list[int]`): latent frames in memory.

        Returns:
            `tuple[list[int], list[int]]`: frames of `held` that stay, and consecutive ones that are encoded again.
        """
        sink = [] if held == list(range(len(held))) else self.sink(held)
        return sink, held[len(sink) :]

    def recommit(self, held: list[int], new: list[int]) -> list[int]:
        """Which frames are encoded again before the commit of a chunk, in a pass of kind `"self"`. By default none.

        Args:
            held (`list[int]`): latent frames in memory.
            new (`list[int]`): latent frames of the chunk.

        Returns:
            `list[int]`: the last frames of `held`, consecutive.
        """
        return []

    def committed(self, frames: list[int], latents: torch.Tensor) -> torch.Tensor | None:
        """What to remember of the clean latents of a chunk; [`RunHistory`] has it as long as the frames are held.

        Args:
            frames (`list[int]`): latent frames of the chunk.
            latents (`torch.Tensor`): their latents, (B, C, frames, H, W).

        Returns:
            `torch.Tensor` or `None`: (B, frames, ...).
        """
        return None

    def after(self, history: RunHistory) -> "Layout":
        """The layout that is asked from now on. By default the layout itself.

        Args:
            history ([`RunHistory`]): what has happened in the run.

        Returns:
            [`Layout`]: a copy that knows what it needs; the layout itself never changes.
        """
        return self

    def sized(self, longest: int) -> "Layout":
        """The layout for a rollout. By default the layout itself.

        Args:
            longest (`int`): latent frames that a pass carries at most.

        Returns:
            [`Layout`]: the layout, in which sizes that were not given follow from those that were.
        """
        return self

    def check(self, longest: int, carried: str) -> None:
        """Refuse a rollout that the layout cannot serve. By default it serves all.

        Args:
            longest (`int`): latent frames that a pass carries at most.
            carried (`str`): what these are, for the message of an error.

        Raises:
            `ValueError`: a setting does not fit; the message names it, its value and what is valid.
        """

    def check_model(self, num_layers: int, num_heads: int, head_dim: int) -> None:
        """Refuse a transformer that the settings do not fit. By default they fit all.

        Args:
            num_layers (`int`): transformer blocks.
            num_heads (`int`), head_dim (`int`): attention heads of a block, and the size of each.

        Raises:
            `ValueError`: as in `check`.
        """


def sink_and_newest(held: list[int], new: list[int], window_size: int | None, num_sink_frames: int) -> list[int]:
    """The frames of `held` in a window; its size includes the sink and the frames `new`."""
    if window_size is None:
        return held
    oldest = new[0] - max(window_size - num_sink_frames - len(new), 0)
    return [frame for frame in held if frame < num_sink_frames or frame >= oldest]


class WindowLayout(Layout):
    """The newest frames of a window, and a sink that never leaves.

    Args:
        window_size (`int` or `"all"`, *optional*):
            Latent frames that attention spans, the current chunk and the sink included; by default all of the past.
        num_sink_frames (`int`): first latent frames that never leave.
        relative_positions (`bool`): count positions inside the window, the sink directly before the recent frames.
        sink_at_commit (`bool`): whether a commit reads the sink too; it then reads fewer recent frames.
    """

    def __init__(
        self,
        window_size: int | None = None,
        num_sink_frames: int = 0,
        relative_positions: bool = False,
        sink_at_commit: bool = True,
    ):
        window_size = None if isinstance(window_size, str) and window_size == "all" else window_size
        if window_size is not None:
            check_int("window_size", window_size, 1, ", or 'all'")
        check_int("num_sink_frames", num_sink_frames, 0)
        check_bool("relative_positions", relative_positions)
        check_bool("sink_at_commit", sink_at_commit)
        self.window_size = window_size
        self.num_sink_frames = num_sink_frames
        self.relative_positions = relative_positions
        self.sink_at_commit = sink_at_commit

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        read = set(self._read(held, new, self.num_sink_frames if self.sink_at_commit else 0))
        return [frame for frame in held if frame in read or frame < self.num_sink_frames]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        reads_sink = pass_.kind != "commit" or self.sink_at_commit
        frames = self._read(held, new, self.num_sink_frames if reads_sink else 0)
        positions, own = frames, new
        if self.relative_positions:
            slots = list(range(len(frames) + len(new)))
            positions, own = slots[: len(frames)], slots[len(frames) :]
        if pass_.is_cut:
            own = [CUT_JUMP + (offset if self.relative_positions else frame) for offset, frame in enumerate(new)]
        return View(frames, positions, own)

    def _read(self, held: list[int], new: list[int], num_sink: int) -> list[int]:
        return sink_and_newest(held, new, self.window_size, num_sink)

    def check(self, longest: int, carried: str) -> None:
        shortest = self.num_sink_frames + longest
        valid = f"None or >= {shortest}: {self.num_sink_frames} sink frames and {carried} of {longest} latent frames"
        fits = self.window_size is None or self.window_size >= shortest
        check(fits, "window_size", self.window_size, valid)
