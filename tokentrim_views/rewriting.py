# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Training-free methods of the field that rewrite keys and values: what leaves lives on in the places of a few frames.

Each states its source. Settings count latent frames, the current chunk and the sink included; defaults are the sources'.
"""

from collections.abc import Sequence

import torch

from ..tokentrim_checks import check, check_int, check_number
from .layout import Layout, Pass, View, WindowLayout
from .memory import Memory
from .windows import DeepSink


class MemoryLayout(Layout):
    """A window of slots: the sink, the places of a memory, and the recent frames with the current chunk. Until that many
    frames are there, they stand at their slots; memory is then in the places of the frames behind the sink.

    Args:
        window_size (`int`), num_sink_frames (`int`): of all, and of the sink.
        num_recent_frames (`int`): recent frames that are read beside the sink and the memory.
        num_memory_frames (`int`): places of the memory.
    """

    one_chunk_a_pass = True
    transitions = ("keep",)  # others would break or re-encode the memory

    def __init__(self, window_size: int, num_sink_frames: int, num_recent_frames: int, num_memory_frames: int):
        check_int("window_size", window_size, 1)
        check_int("num_sink_frames", num_sink_frames, 0)
        check_int("num_recent_frames", num_recent_frames, 1)
        self.window_size = window_size
        self.num_sink_frames = num_sink_frames
        self.num_recent_frames = num_recent_frames
        self.num_kept = num_sink_frames + num_memory_frames  # first latent frames whose places never leave

    def fits(self, new: list[int]) -> bool:
        """Whether all frames so far are in the window."""
        return new[-1] < self.window_size

    def slots(self, frames: list[int], new: list[int]) -> View:
        """Frames, and behind them the pass's own, at 0, 1, 2, ..."""
        num_read = len(frames)
        return View(frames, list(range(num_read)), list(range(num_read, num_read + len(new))))


class MemRoPE(MemoryLayout):
    """MemRoPE (YoungRaeKimm/MemRoPE): keys and values that leave the window enter two running averages over frames and
    tokens, in the places of the two frames behind the sink.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        num_recent_frames (`int`): recent frames, without the current chunk.
        slow (`float`), fast (`float`): what newcomers weigh in each average.
    """

    def __init__(
        self,
        window_size: int = 12,
        num_sink_frames: int = 3,
        num_recent_frames: int = 4,
        slow: float = 0.01,
        fast: float = 0.1,
    ):
        super().__init__(window_size, num_sink_frames, num_recent_frames, num_memory_frames=2)
        for name, rate in (("slow", slow), ("fast", fast)):
            check_number(name, rate, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        self.slow = slow
        self.fast = fast

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


class Tether(MemoryLayout):
    """TetherCache (my4f175/TetherCache): in each layer, frames that leave compete for a memory by attention mass and
    diversity (GRAB), and what is admitted takes on the statistics of sink and memory (TAME).

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        num_recent_frames (`int`): recent frames, the current chunk included; the rest of the window is memory.
        diversity (`float`): what a frame's distance from others weighs against its attention mass.
        align (`float`): how far admitted frames are moved to the statistics, 0 to 1.
        temperature (`float`): of the attention mass.
    """

    def __init__(
        self,
        window_size: int = 21,
        num_sink_frames: int = 3,
        num_recent_frames: int = 4,
        diversity: float = 0.35,
        align: float = 0.35,
        temperature: float = 1.0,
    ):
        check_int("window_size", window_size, 1)
        check_number("diversity", diversity, lambda value: value >= 0, "a finite number >= 0")
        check_number("align", align, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        check_number("temperature", temperature, lambda value: value > 0, "a finite number > 0")
        check_int("num_sink_frames", num_sink_frames, 0)
        check_int("num_recent_frames", num_recent_frames, 1)
        num_memory_frames = window_size - num_sink_frames - num_recent_frames
        super().__init__(window_size, num_sink_frames, num_recent_frames, num_memory_frames)
        self.diversity = diversity
        self.align = align
        self.temperature = temperature

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        oldest = new[0] - self.num_recent_frames  # what leaves with this chunk is there until it is committed
        return [frame for frame in held if frame < self.num_kept or frame >= oldest]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        oldest = new[0] - self.num_recent_frames + len(new)
        return self.slots([frame for frame in held if frame < self.num_kept or frame >= oldest], new)

    def before_commit(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """Admission: the M highest of mass + alpha * diversity among memory and what leaves stay, in order."""
        if self.fits(new):
            return
        occupied = [place for place, held in enumerate(memory.held) if held.any()]
        frames, oldest = memory.frames, new[0] - self.num_recent_frames + len(new)
        sink = [place for place in occupied if frames[place] < self.num_sink_frames]
        old = [place for place in occupied if self.num_sink_frames <= frames[place] < self.num_kept]
        leaving = [place for place in occupied if self.num_kept <= frames[place] < oldest]
        candidates = old + leaving
        if not old or not leaving:
            return
        origins = [frames[place] + int(memory.tag[place, :, 0].max()) for place in candidates]
        scores = self.scores(memory, candidates, origins, query)
        kept = sorted(scores.topk(len(old)).indices.tolist())
        key, value, held = memory.key.clone(), memory.value.clone(), memory.held
        for table, rewritten in ((key, memory.key), (value, memory.value)):
            reference = channel_statistics([table[place][held[place]] for place in sink + old])
            for target, choice in zip(old, kept):
                source, tokens = candidates[choice], (held[target] & held[candidates[choice]])
                frame = table[source]
                if source in leaving:
                    frame = aligned(frame, held[source], reference, self.align)
                rewritten[target, tokens] = frame[tokens].to(rewritten.dtype)
        tag = memory.tag.clone()
        for target, choice in zip(old, kept):
            tag[target, :, 0] = origins[choice] - frames[target]
        memory.tag = tag

    def scores(
        self, memory: Memory, candidates: Sequence[int], frames: Sequence[int], query: torch.Tensor
    ) -> torch.Tensor:
        """mass = softmax of the mean of q k^T / sqrt(d); diversity_i = max(0, 1 - max_j exp(-|f_i - f_j| / sigma) mass_j),
        j != i."""
        keys = torch.stack([memory.key[place][memory.held[place]].float().mean(dim=0) for place in candidates])
        mean = (keys * query.float().mean(dim=0)).sum(dim=-1).mean(dim=-1) / keys.shape[-1] ** 0.5
        mass = (mean / self.temperature).softmax(dim=0)
        time = torch.tensor(frames, dtype=torch.float32, device=mass.device)
        sigma = max(1.0, (max(frames) - min(frames) + 1) / 2)
        nearness = (-(time[:, None] - time).abs() / sigma).exp().fill_diagonal_(0)
        diversity = (1 - (nearness * mass).amax(dim=1)).clamp_min(0)
        return mass + self.diversity * diversity

    def check(self, longest: int, carried: str) -> None:
        size, valid = self.num_recent_frames, f">= {longest}: {carried}"
        check(size >= longest, "num_recent_frames", size, valid)
        shortest = self.num_sink_frames + self.num_recent_frames + longest
        valid = f">= {shortest}: {self.num_sink_frames} sink frames, {size} recent ones and a memory of {longest}"
        check(self.window_size >= shortest, "window_size", self.window_size, valid)


class Tame(WindowLayout):
    """The alignment of TetherCache (TAME) without its memory: keys and values of each frame behind the sink take on the
    sink's statistics, once, before the next chunk reads them.

    Args:
        window_size (`int`, *optional*), num_sink_frames (`int`), relative_positions (`bool`): as in [`WindowLayout`].
        align (`float`): how far frames are moved to the statistics, 0 to 1.
    """

    one_chunk_a_pass = True

    def __init__(
        self,
        window_size: int | None = 21,
        num_sink_frames: int = 3,
        relative_positions: bool = False,
        align: float = 0.35,
    ):
        super().__init__(window_size, num_sink_frames, relative_positions)
        check(num_sink_frames > 0, "num_sink_frames", num_sink_frames, "at least 1: the alignment is to the sink")
        check_number("align", align, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        self.align = align

    def before_chunk(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        sink = [place for place, frame in enumerate(memory.frames) if frame < self.num_sink_frames]
        tag = memory.tag.clone()
        for table in (memory.key, memory.value):
            tokens = [table[place][memory.held[place]] for place in sink]
            if not any(map(len, tokens)):
                return
            reference = channel_statistics(tokens)
            for place in range(len(sink), len(memory.frames)):
                if memory.held[place].any() and not memory.tag[place].any():
                    table[place] = aligned(table[place], memory.held[place], reference, self.align).to(table.dtype)
                    tag[place, :, 0] = 1
        memory.tag = tag


class EmaSink(WindowLayout):
    """Reward Forcing (arXiv 2512.04678, JaydenLyh/Reward-Forcing): keys and values that leave the window enter those of
    the sink, token by token, as a running average. Frames stand at their slots in the window.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        decay (`float`): what the sink keeps of itself when a frame enters it.
    """

    one_chunk_a_pass = True
    transitions = ("keep",)  # others would re-encode the averages

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


class CompressedSink(MemoryLayout):
    """Deep Forcing (cvlab-kaist/DeepForcing) with participative compression: where the window is full, in each layer the
    single tokens that recent queries attend to most stay of all between a deep sink and the recent frames.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        budget (`int`): latent frames' worth of tokens that a compression leaves.
        num_recent_frames (`int`): recent frames that stay whole and whose queries count, the current chunk included.
    """

    max_selections = 7  # a token that was selected as often is no candidate any more

    def __init__(self, window_size: int, num_sink_frames: int, budget: int, num_recent_frames: int):
        check_int("budget", budget, 1)
        check_int("num_sink_frames", num_sink_frames, 0)
        check_int("num_recent_frames", num_recent_frames, 1)
        super().__init__(window_size, num_sink_frames, num_recent_frames, budget - num_sink_frames - num_recent_frames)
        self.budget = budget

    def sink(self, held: list[int]) -> list[int]:
        return [frame for frame in held if frame < self.num_kept]  # what was selected stays as well

    def compressed_at(self, new: list[int]) -> int | None:
        """The first frame of the last chunk, up to `new`, before which the window was compressed."""
        if self.fits(new):
            return None
        size = len(new)
        period = ((self.window_size - self.budget) // size + 1) * size
        return new[0] - (new[-1] - self.window_size) // size * size % period

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        before = [frame - len(new) for frame in new]
        oldest = self.oldest(before) if before[0] >= 0 else 0  # what is compressed with this chunk is there until then
        return [frame for frame in held if frame < self.num_kept or frame >= oldest]

    def oldest(self, new: list[int]) -> int:
        """The first recent frame since the last compression; before it, only places that never leave are read."""
        start = self.compressed_at(new)
        return 0 if start is None else start - self.num_recent_frames + len(new)

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        start, oldest = self.compressed_at(new), self.oldest(new)
        frames = [frame for frame in held if frame < self.num_kept or frame >= oldest]
        moved = 0 if start is None else start - self.budget
        return View(frames, [frame + moved if frame < self.num_sink_frames else frame for frame in frames], new)

    def before_chunk(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """Compression: the highest of sum over heads and recent queries of q . k, rotated both, take the places behind the
        sink, with their time and grid place."""
        if self.compressed_at(new) != new[0]:
            return
        oldest, device = self.oldest(new), query.device
        asked = self.rotated_queries(memory, new, query).sum(dim=0) + (0 if memory.note is None else memory.note)
        time = torch.tensor(memory.frames, device=device)[:, None]
        between = memory.held & (time >= self.num_sink_frames) & (time < oldest)
        frame, token = between.nonzero(as_tuple=True)
        key = memory.turned(memory.key[between], time[frame, 0].cpu(), memory.places[token.cpu()])
        scores = (key * asked).sum(dim=(-2, -1))
        scores = scores.masked_fill(memory.tag[between][:, 0] >= self.max_selections, -torch.inf)
        target = (memory.held & (time >= self.num_sink_frames) & (time < self.num_kept)).nonzero(as_tuple=True)
        kept = scores.topk(len(target[0])).indices.sort().values
        frame, token = frame[kept], token[kept]
        key = memory.turned(key[kept], -time[target[0], 0].cpu(), -memory.places[target[1].cpu()])
        moved = [torch.ones_like(frame), time[frame, 0] - time[target[0], 0], token - target[1]]
        tag = memory.tag[frame, token] + torch.stack(moved, dim=-1)  # selections, and where it is from
        value = memory.value[frame, token]
        for table, rewritten in ((memory.key, key), (memory.value, value), (memory.tag, tag)):
            table[target] = rewritten.to(table.dtype)

    def before_commit(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """Of its queries, those of the last frames count in the next compression."""
        num_frames = max(self.num_recent_frames - len(new), 0)
        num_tokens = num_frames * len(memory.places)
        rotated = self.rotated_queries(memory, new, query)
        memory.note = rotated[len(rotated) - num_tokens :].sum(dim=0)

    def rotated_queries(self, memory: Memory, new: list[int], query: torch.Tensor) -> torch.Tensor:
        num_tokens = len(memory.places)
        time = torch.tensor(new).repeat_interleave(num_tokens)
        return memory.turned(query, time, memory.places.repeat(len(new), 1))

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


def aligned(
    frame: torch.Tensor, held: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor], share: float
) -> torch.Tensor:
    """TAME: (1 - tau) x + tau ((x - m) / s * S + M), by head and channel, m and s of the frame's own tokens, in fp32."""
    (mean, std), (own_mean, own_std) = reference, channel_statistics([frame[held]])
    frame = frame.float()
    return torch.lerp(frame, (frame - own_mean) / own_std * std + mean, share)


def channel_statistics(frames: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation of the tokens of some frames, by head and channel, in fp32."""
    tokens = torch.cat(list(frames)).float()
    return tokens.mean(dim=0), tokens.std(dim=0, correction=0).clamp_min(1e-6)
