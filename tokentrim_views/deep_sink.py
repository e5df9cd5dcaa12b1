# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Deep Forcing: a deep sink, and one compressed by attention mass."""

from dataclasses import replace

import torch

from ..tokentrim_checks import check, check_int
from .averages import MemoryLayout
from .layout import Layout, Pass, View, WindowLayout
from .memory import Memory


class DeepSink(WindowLayout):
    """Deep Forcing's deep sink (cvlab-kaist/DeepForcing): more than half of the window is a sink, whose
    positions move along with the video.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
    """

    one_chunk_a_pass = True

    def __init__(self, window_size: int = 21, num_sink_frames: int = 14):
        check_int("window_size", window_size, 1)
        super().__init__(window_size, num_sink_frames)

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        view, moved = super().view(held, new, pass_), max(new[0] - self.window_size, 0)
        positions = [frame + moved if frame < self.num_sink_frames else frame for frame in view.frames]
        return replace(view, positions=positions)


class CompressedSink(MemoryLayout):
    """Deep Forcing (cvlab-kaist/DeepForcing) with participative compression: when the window is full, each layer keeps,
    of all tokens between a deep sink and the recent frames, those that recent queries attend to most.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        budget (`int`): size of the context after a compression, in latent frames' worth of tokens.
        num_recent_frames (`int`): recent frames that stay whole and whose queries count, the current chunk included.
    """

    max_selections = 7  # a token that was selected this often is no longer a candidate
    moves_sink = True  # to where a compression leaves it

    def __init__(self, window_size: int, num_sink_frames: int, budget: int, num_recent_frames: int):
        check_int("budget", budget, 1)
        check_int("num_sink_frames", num_sink_frames, 0)
        check_int("num_recent_frames", num_recent_frames, 1)
        super().__init__(window_size, num_sink_frames, num_recent_frames, budget - num_sink_frames - num_recent_frames)
        self.budget = budget

    def sink(self, held: list[int]) -> list[int]:
        return [frame for frame in held if frame < self.num_kept]  # includes the selected tokens

    def compressed_at(self, new: list[int]) -> int | None:
        """The first frame of the last chunk, up to `new`, before which the window was compressed."""
        if self.fits(new):
            return None
        size = len(new)
        period = ((self.window_size - self.budget) // size + 1) * size
        return new[0] - (new[-1] - self.window_size) // size * size % period

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        before = [frame - len(new) for frame in new]
        oldest = (
            self.oldest(before) if before[0] >= 0 else 0
        )  # frames that are compressed with this chunk stay until then
        return [frame for frame in held if frame < self.num_kept or frame >= oldest]

    def oldest(self, new: list[int]) -> int:
        """The first recent frame since the last compression; before it, only places that never leave are read."""
        start = self.compressed_at(new)
        return 0 if start is None else start - self.num_recent_frames + len(new)

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        start, oldest = self.compressed_at(new), self.oldest(new)
        frames = [frame for frame in held if frame < self.num_kept or frame >= oldest]
        moved = start - self.budget if self.moves_sink and start is not None else 0
        return View(frames, [frame + moved if frame < self.num_sink_frames else frame for frame in frames], new)

    def before_chunk(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """Compression: the tokens with the highest sum over heads and recent queries of q . k, both rotated, take the places
        behind the sink and keep their time and grid position."""
        if self.compressed_at(new) != new[0]:
            return
        oldest, device = self.oldest(new), query.device
        asked = self.rotated_queries(memory, new, query).sum(dim=0) + (0 if memory.note is None else memory.note)
        time = torch.tensor(memory.frames, device=device)[:, None]
        between = memory.held & (time >= self.num_sink_frames) & (time < oldest)
        frame, token = between.nonzero(as_tuple=True)
        key = memory.rotated(memory.key[between], time[frame, 0].cpu(), memory.places[token.cpu()])
        scores = (key * asked).sum(dim=(-2, -1))
        scores = scores.masked_fill(memory.tag[between][:, 0] >= self.max_selections, -torch.inf)
        target = (memory.held & (time >= self.num_sink_frames) & (time < self.num_kept)).nonzero(as_tuple=True)
        kept = scores.topk(len(target[0])).indices.sort().values
        frame, token = frame[kept], token[kept]
        key = memory.rotated(key[kept], -time[target[0], 0].cpu(), -memory.places[target[1].cpu()])
        moved = [torch.ones_like(frame), time[frame, 0] - time[target[0], 0], token - target[1]]
        tag = memory.tag[frame, token] + torch.stack(moved, dim=-1)  # number of selections, and the original place
        value = memory.value[frame, token]
        for table, rewritten in ((memory.key, key), (memory.value, value), (memory.tag, tag)):
            table[target] = rewritten.to(table.dtype)

    def before_commit(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """Note the queries of the last frames for the next compression."""
        num_frames = max(self.num_recent_frames - len(new), 0)
        num_tokens = num_frames * len(memory.places)
        rotated = self.rotated_queries(memory, new, query)
        memory.note = rotated[len(rotated) - num_tokens :].sum(dim=0)

    def rotated_queries(self, memory: Memory, new: list[int], query: torch.Tensor) -> torch.Tensor:
        num_tokens = len(memory.places)
        time = torch.tensor(new).repeat_interleave(num_tokens)
        return memory.rotated(query, time, memory.places.repeat(len(new), 1))

    def check(self, longest: int, carried: str) -> None:
        shortest = self.num_sink_frames + self.num_recent_frames + 1
        valid = f"from {shortest} to `window_size`, {self.window_size}: the sink, a selection and recent frames"
        check(shortest <= self.budget <= self.window_size, "budget", self.budget, valid)
        size = self.num_recent_frames
        check(longest <= size <= 2 * longest, "num_recent_frames", size, f"from {longest} to {2 * longest}: {carried}")


def deep_sink(
    window_size: int = 21, num_sink_frames: int | None = None, budget: int | None = None, num_recent_frames: int = 4
) -> Layout:
    """Deep Forcing: [`DeepSink`], or with a `budget` [`CompressedSink`]; the sink is 14 or 10 frames by default."""
    if num_sink_frames is None:
        num_sink_frames = 14 if budget is None else 10
    if budget is None:
        return DeepSink(window_size, num_sink_frames)
    check_int("window_size", window_size, 1)
    return CompressedSink(window_size, num_sink_frames, budget, num_recent_frames)
