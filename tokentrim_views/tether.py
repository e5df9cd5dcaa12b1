# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TetherCache: a memory chosen by attention mass and diversity, aligned to the sink (TAME)."""

from collections.abc import Sequence

import torch

from ..tokentrim_checks import check, check_int, check_number
from .averages import MemoryLayout
from .layout import Pass, View, WindowLayout
from .memory import Memory


class Tether(MemoryLayout):
    """TetherCache (my4f175/TetherCache): in each layer, frames that leave the window compete for places in a memory by
    attention mass and diversity (GRAB); admitted frames are aligned to the statistics of sink and memory (TAME).

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        num_recent_frames (`int`): recent frames, the current chunk included; the rest of the window is memory.
        diversity (`float`): weight of a frame's distance from others, relative to its attention mass.
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
        oldest = new[0] - self.num_recent_frames  # frames that leave with this chunk stay until it is committed
        return [frame for frame in held if frame < self.num_kept or frame >= oldest]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        oldest = new[0] - self.num_recent_frames + len(new)
        return self.slots([frame for frame in held if frame < self.num_kept or frame >= oldest], new)

    def before_commit(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """Admission: of memory and leaving frames, the M with the highest mass + alpha * diversity stay, in order."""
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
    """The alignment of TetherCache (TAME) without its memory: keys and values of each frame behind the sink are
    aligned to the sink's statistics once, before the next chunk reads them.

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
