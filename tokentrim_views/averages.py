# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Layouts that add frames which leave the window to running averages. Each names its source."""

import copy

import torch

from ..tokentrim_checks import check, check_int, check_number
from .layout import Layout, Pass, View, WindowLayout
from .memory import Memory


class MemoryLayout(Layout):
    """A window of slots: the sink, a memory, and the recent frames with the current chunk. Until there are more frames
    than slots, each frame has its own slot; after that, the memory uses the places of the frames behind the sink.

    Args:
        window_size (`int`), num_sink_frames (`int`): latent frames of the window, and of its sink.
        num_recent_frames (`int`): recent frames that are read in addition to the sink and the memory.
        num_memory_frames (`int`): latent frames of the memory.
    """

    one_chunk_a_pass = True
    transitions = ("keep",)  # the others would break or re-encode the memory

    def __init__(self, window_size: int, num_sink_frames: int, num_recent_frames: int, num_memory_frames: int):
        check_int("window_size", window_size, 1)
        check_int("num_sink_frames", num_sink_frames, 0)
        check_int("num_recent_frames", num_recent_frames, 1)
        self.window_size = window_size
        self.num_sink_frames = num_sink_frames
        self.num_recent_frames = num_recent_frames
        self.num_kept = num_sink_frames + num_memory_frames  # first latent frames that stay in memory

    def fits(self, new: list[int]) -> bool:
        """Whether all frames of the video so far fit into the window."""
        return new[-1] < self.window_size

    def slots(self, frames: list[int], new: list[int]) -> View:
        """Frames, then those of the pass, at the positions 0, 1, 2, ..."""
        num_read = len(frames)
        return View(frames, list(range(num_read)), list(range(num_read, num_read + len(new))))


class MemRoPE(MemoryLayout):
    """MemRoPE (YoungRaeKimm/MemRoPE): keys and values that leave the window are added to two running averages over
    frames and tokens, which use the places of the two frames behind the sink.

    Args:
        window_size (`int`, *optional*): as in [`WindowLayout`]; by default 12, or what the others need.
        num_sink_frames (`int`): as in [`WindowLayout`].
        num_recent_frames (`int`, *optional*): recent frames, without the current chunk; by default the rest of the window, at least 4.
        slow (`float`), fast (`float`): the weight of new values in each average.
    """

    def __init__(
        self,
        window_size: int | None = None,
        num_sink_frames: int = 3,
        num_recent_frames: int | None = None,
        slow: float = 0.01,
        fast: float = 0.1,
    ):
        given = window_size, num_recent_frames
        super().__init__(window_size or 12, num_sink_frames, num_recent_frames or 4, num_memory_frames=2)
        for name, value in zip(("window_size", "num_recent_frames"), given):
            if value is not None:
                check_int(name, value, 1)
        self.given = given
        for name, rate in (("slow", slow), ("fast", fast)):
            check_number(name, rate, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        self.slow = slow
        self.fast = fast

    def sized(self, longest: int) -> "MemRoPE":
        window_size, num_recent_frames = self.given
        if window_size is None:
            needed = self.num_kept + self.num_recent_frames + longest
            window_size = needed if num_recent_frames is not None else max(needed, self.window_size)
        if num_recent_frames is None:
            num_recent_frames = max(window_size - self.num_kept - longest, self.num_recent_frames)
        sized = copy.copy(self)
        sized.window_size, sized.num_recent_frames = window_size, num_recent_frames
        return sized

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        oldest = new[0] - self.num_recent_frames - len(new)  # what leaves with this chunk is averaged first
        return [frame for frame in held if frame < self.num_kept or frame >= oldest or new[0] <= self.window_size]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        oldest = new[0] - self.num_recent_frames
        return self.slots([frame for frame in held if self.fits(new) or frame < self.num_kept or frame >= oldest], new)

    def before_chunk(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """m = the mean of what leaves; slow = 0.01 m + 0.99 slow, fast = 0.1 m + 0.9 fast; at first both are m."""
        leaving = [self.num_kept <= frame < new[0] - self.num_recent_frames for frame in memory.frames]
        leaving = memory.held & torch.tensor(leaving, device=memory.held.device)[:, None]
        if self.fits(new) or not leaving.any():
            return
        is_first = new[0] <= self.window_size
        for frame, rate in zip(range(self.num_sink_frames, self.num_kept), (self.slow, self.fast)):
            place, rate = memory.frames.index(frame), 1.0 if is_first else rate
            for table in (memory.key, memory.value):
                mean = table[leaving].float().mean(dim=0)
                table[place] = rate * mean + (1 - rate) * table[place].float()

    def check(self, longest: int, carried: str) -> None:
        shortest = self.num_kept + self.num_recent_frames + longest
        valid = (
            f">= {shortest}: {self.num_sink_frames} sink frames, 2 averages, {self.num_recent_frames} and {carried}"
        )
        check(self.window_size >= shortest, "window_size", self.window_size, valid)


class EmaSink(WindowLayout):
    """Reward Forcing (arXiv 2512.04678, JaydenLyh/Reward-Forcing): keys and values that leave the window are
    averaged into those of the sink, token by token. Positions are slots of the window.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        decay (`float`): the weight of the sink's own values when a frame is averaged in.
    """

    one_chunk_a_pass = True
    transitions = ("keep",)  # the others would re-encode the averages

    def __init__(self, window_size: int = 9, num_sink_frames: int = 3, decay: float = 0.999):
        check_int("window_size", window_size, 1)
        super().__init__(window_size, num_sink_frames, relative_positions=True)
        check(num_sink_frames > 0, "num_sink_frames", num_sink_frames, "at least 1: the averages are in its places")
        check_number("decay", decay, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        self.decay = decay

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        oldest = new[0] - self.window_size + self.num_sink_frames  # what leaves with this chunk enters the sink first
        return [frame for frame in held if frame < self.num_sink_frames or frame >= oldest]

    def before_chunk(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """sink = 0.999 sink + 0.001 x, for each x that leaves: frame f enters the sink's frame f mod its size."""
        oldest = new[-1] + 1 - self.window_size + self.num_sink_frames
        for source, frame in enumerate(memory.frames):
            if not self.num_sink_frames <= frame < oldest:
                continue
            target = memory.frames.index(frame % self.num_sink_frames)
            tokens = memory.held[source] & memory.held[target]
            for table in (memory.key, memory.value):
                pair = table[source][tokens].float(), table[target][tokens].float()
                table[target, tokens] = torch.lerp(*pair, self.decay).to(table.dtype)
