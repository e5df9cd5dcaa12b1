# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Published training-free layouts that only choose past frames, positions and weights.

Each names its source. Sizes count latent frames, including the current chunk and the sink; defaults are the source's.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from ..tokentrim_checks import check, check_bool, check_int, check_list, check_number
from .layout import Layout, Pass, View, WindowLayout, sink_and_newest


class InfinityRope(WindowLayout):
    """Infinity-RoPE (arXiv 2511.20649): positions are slots of the window; queries are at its end, also while slots refill
    after a flush. Meant for the transitions `flush` and `cut`.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
    """

    one_chunk_a_pass = True

    def __init__(self, window_size: int = 6, num_sink_frames: int = 1):
        check_int("window_size", window_size, 1)
        super().__init__(window_size, num_sink_frames, relative_positions=True)

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        view = super().view(held, new, pass_)
        if pass_.is_cut:
            return view
        first = min(new[0], self.window_size - len(new))
        return replace(view, query_positions=list(range(first, first + len(new))))


class LongLive(WindowLayout):
    """LongLive (arXiv 2509.22622): a window with a sink. Meant for the transition `recache`.

    Args:
        window_size (`int`), num_sink_frames (`int`), relative_positions (`bool`): as in [`WindowLayout`].
        renew_sink (`bool`): whether the first frames that a recache encodes become the sink, instead of those of the
            first prompt.
    """

    def __init__(
        self,
        window_size: int = 12,
        num_sink_frames: int = 3,
        relative_positions: bool = False,
        renew_sink: bool = False,
    ):
        check_int("window_size", window_size, 1)
        check_bool("renew_sink", renew_sink)
        super().__init__(window_size, num_sink_frames, relative_positions)
        self.renew_sink = renew_sink

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        if not self.renew_sink:
            return super().keep(held, new)
        newest = sink_and_newest(held, new, self.window_size, 0)  # what a recache encodes
        return [frame for frame in held if frame in held[: self.num_sink_frames] or frame in newest]

    def sink(self, held: list[int]) -> list[int]:
        return held[: self.num_sink_frames] if self.renew_sink else super().sink(held)

    def recache(self, held: list[int]) -> tuple[list[int], list[int]]:
        return ([], held[-self.window_size :]) if self.renew_sink else super().recache(held)

    def _read(self, held: list[int], new: list[int], num_sink: int) -> list[int]:
        if not self.renew_sink:
            return super()._read(held, new, num_sink)
        newest = sink_and_newest(held, new, self.window_size - num_sink, 0)
        return [frame for frame in held if frame in held[:num_sink] or frame in newest]


class CommitForcing(WindowLayout):
    """Commit Forcing (Dwell-Jing/commit-forcing): denoising reads the sink, the commit does not; and its Recency Forcing:
    chunks weigh less the older they are, most in the first steps.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`], of denoising.
        move_sink (`bool`): whether the sink's positions are directly before the newest frames.
        commit_window_size (`int`, *optional*): latent frames that a commit spans, without the sink; `None`: as denoising.
        recency_bias (`bool`): whether denoising weights chunks by their age.
    """

    def __init__(
        self,
        window_size: int = 21,
        num_sink_frames: int = 3,
        move_sink: bool = True,
        commit_window_size: int | None = 21,
        recency_bias: bool = False,
    ):
        check_int("window_size", window_size, 1)
        check_bool("move_sink", move_sink)
        if commit_window_size is not None:
            check_int("commit_window_size", commit_window_size, 1)
        check_bool("recency_bias", recency_bias)
        super().__init__(window_size, num_sink_frames)
        self.move_sink = move_sink
        self.commit_window_size = commit_window_size
        self.recency_bias = recency_bias
        self.one_chunk_a_pass = recency_bias

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        window_size = max(self.window_size - self.num_sink_frames, self.commit_window_size or 0)
        newest = sink_and_newest(held, new, window_size, 0)
        return [frame for frame in held if frame < self.num_sink_frames or frame in newest]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        view = super().view(held, new, pass_)
        if pass_.kind == "commit" and self.commit_window_size is not None:
            frames = sink_and_newest(held, new, self.commit_window_size, 0)
            return replace(view, frames=frames, positions=frames)
        num_sink = sum(frame < self.num_sink_frames for frame in view.frames)
        if self.move_sink:
            recent = view.frames[num_sink:]
            first = (recent or new)[0] - num_sink
            view = replace(view, positions=[*range(first, first + num_sink), *recent])
        if self.recency_bias and pass_.kind == "denoise":
            total = len(view.frames) + len(new)
            ages = [(total - 1 - place) // len(new) for place in range(len(view.frames))]  # in chunks
            weights = [0.0] * num_sink + [self.recency_weight(age, pass_.step) for age in ages[num_sink:]]
            view = replace(view, log_weights=weights)
        return view

    @staticmethod
    def recency_weight(age: int, step: int) -> float:
        """Log weight of a chunk `age` chunks back: -4 min(1, (age - 1) / 4)^(0.1 * 2^s), s = 1, 2, ... the step."""
        return -4 * min(1.0, (age - 1) / 4) ** (0.1 * 2 ** (step + 1)) if age > 1 else 0.0

    def check(self, longest: int, carried: str) -> None:
        super().check(longest, carried)
        size = self.commit_window_size
        check(size is None or size >= longest, "commit_window_size", size, f"None or >= {longest}: {carried}")


class RollingSink(Layout):
    """Rolling Sink (haodong2000/RollingSink): of the past, only the last chunk is read unchanged; before it, the frames of
    the first window are replayed, forwards and backwards.

    Args:
        window_size (`int`): latent frames that attention spans, the current chunk included.
    """

    one_chunk_a_pass = True
    transitions = ("keep",)  # the others would break or re-encode the archive

    def __init__(self, window_size: int = 21):
        check_int("window_size", window_size, 1)
        self.window_size = window_size

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        return [frame for frame in held if frame < self.window_size - len(new) or frame >= new[0] - len(new)]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        lap, last = self.window_size - len(new), new[0] - len(new)
        slots = range(max(new[0] - lap, 0), new[0])
        frames = {slot: slot if slot >= last else self.replayed(slot, lap) for slot in slots}
        positions = [slot for slot in slots if frames[slot] in held]
        return View([frames[slot] for slot in positions], positions, new)

    @staticmethod
    def replayed(frame: int, lap: int) -> int:
        """The archive frame that replaces `frame`: forwards in even laps, backwards in odd ones."""
        number, place = divmod(frame, lap)
        return lap - 1 - place if number % 2 else place

    def check(self, longest: int, carried: str) -> None:
        fits = self.window_size >= 2 * longest
        check(fits, "window_size", self.window_size, f">= {2 * longest}: {carried} and the one before it")


class AttentionBias(WindowLayout):
    """A log weight on the past (daydreamlive/scope, for Krea Realtime): denoising attends less to all cached
    frames except the oldest.

    Args:
        window_size (`int`, *optional*), num_sink_frames (`int`): as in [`WindowLayout`].
        weight (`float`): weight of a past key; 1 changes nothing.
    """

    def __init__(self, window_size: int | None = None, num_sink_frames: int = 0, weight: float = 0.3):
        check_number("weight", weight, lambda value: value > 0, "a finite number > 0")
        super().__init__(window_size, num_sink_frames)
        self.weight = weight

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        view = super().view(held, new, pass_)
        if pass_.kind != "denoise":
            return view
        return replace(
            view, log_weights=[0.0 if place == 0 else math.log(self.weight) for place in range(len(view.frames))]
        )


class Strided(WindowLayout):
    """A sink, every n-th frame of the past, and the newest frames.

    Args:
        window_size (`int`), num_sink_frames (`int`), relative_positions (`bool`): as in [`WindowLayout`].
        stride (`int`): distance of the frames between the sink and the newest ones.
        num_strided_frames (`int`): how many of these there are at most.
    """

    one_chunk_a_pass = True
    transitions = ("keep", "flush", "cut")  # its frames do not follow each other, as a recache needs

    def __init__(
        self,
        window_size: int = 21,
        num_sink_frames: int = 3,
        stride: int = 6,
        num_strided_frames: int = 6,
        relative_positions: bool = True,
    ):
        check_int("window_size", window_size, 1)
        check_int("stride", stride, 2)
        check_int("num_strided_frames", num_strided_frames, 1)
        super().__init__(window_size, num_sink_frames, relative_positions)
        self.stride = stride
        self.num_strided_frames = num_strided_frames

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        oldest = new[0] - self.window_size - self.stride * self.num_strided_frames
        read = self._read(held, new, self.num_sink_frames)
        return [frame for frame in held if frame in read or (frame % self.stride == 0 and frame >= oldest)]

    def _read(self, held: list[int], new: list[int], num_sink: int) -> list[int]:
        newest = sink_and_newest(held, new, self.window_size - self.num_strided_frames, num_sink)
        strided = [frame for frame in held if frame % self.stride == 0 and frame not in newest]
        strided = strided[-self.num_strided_frames :]
        return [frame for frame in held if frame in newest or frame in strided]

    def check(self, longest: int, carried: str) -> None:
        shortest = self.num_sink_frames + self.num_strided_frames + longest
        valid = (
            f">= {shortest}: {self.num_sink_frames} sink frames, {self.num_strided_frames} strided ones and {carried}"
        )
        check(self.window_size >= shortest, "window_size", self.window_size, valid)


class Pinned(WindowLayout):
    """A window, and frames that never leave once they are generated, wherever they are in the video.

    Args:
        frames (`list[int]`): the pinned latent frames; the window includes those that were generated.
        window_size (`int`), num_sink_frames (`int`), relative_positions (`bool`): as in [`WindowLayout`].
    """

    one_chunk_a_pass = True
    transitions = ("keep", "flush", "cut")  # its frames do not follow each other, as a recache needs

    def __init__(
        self,
        frames: Sequence[int] = (),
        window_size: int = 21,
        num_sink_frames: int = 3,
        relative_positions: bool = True,
    ):
        check_int("window_size", window_size, 1)
        check_list("frames", frames, int, "a list of latent frames >= 0")
        check(min(frames, default=0) >= 0, "frames", frames, "a list of latent frames >= 0")
        super().__init__(window_size, num_sink_frames, relative_positions)
        self.frames = sorted(set(frames))

    def sink(self, held: list[int]) -> list[int]:
        return [frame for frame in held if frame < self.num_sink_frames or frame in self.frames]

    def _read(self, held: list[int], new: list[int], num_sink: int) -> list[int]:
        pinned = [frame for frame in held if frame < num_sink or frame in self.frames]
        free = [frame for frame in held if frame not in pinned]
        newest = free[max(len(pinned) + len(free) + len(new) - self.window_size, 0) :]
        return [frame for frame in held if frame in pinned or frame in newest]

    def check(self, longest: int, carried: str) -> None:
        shortest = len({*self.frames, *range(self.num_sink_frames)}) + longest
        valid = f">= {shortest}: {self.num_sink_frames} sink frames, pinned ones and {carried}"
        check(self.window_size >= shortest, "window_size", self.window_size, valid)
