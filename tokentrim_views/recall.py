# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Layouts that look back beyond the newest frames: a memory that is searched, chunks that read only themselves, shots.

Each names its source. Sizes count latent frames, including the current chunk and the sink; defaults are the source's.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..tokentrim_checks import check, check_bool, check_int
from .layout import Layout, sink_and_newest
from .view import Pass, RunHistory, View


class LatentMemory(Layout):
    """LongLive-RAG (qixinhu11/LongLive-RAG) with average pooling: frames that left the window are found again by the cosine
    similarity of their mean latents to those of the last frame. All frames stay in memory.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        num_memory_frames (`int`): frames that are found again; all of them stand at position 0.
        num_excluded_frames (`int`): newest frames outside the window that are not searched.
    """

    one_chunk_a_pass = True
    for_heads = False
    transitions = ("keep",)  # the others would drop or re-encode what is searched

    def __init__(
        self,
        window_size: int = 12,
        num_sink_frames: int = 1,
        num_memory_frames: int = 6,
        num_excluded_frames: int = 5,
    ):
        check_int("window_size", window_size, 1)
        check_int("num_sink_frames", num_sink_frames, 0)
        check_int("num_memory_frames", num_memory_frames, 1)
        check_int("num_excluded_frames", num_excluded_frames, 0)
        self.window_size = window_size
        self.num_sink_frames = num_sink_frames
        self.num_memory_frames = num_memory_frames
        self.num_excluded_frames = num_excluded_frames
        self.means: Mapping[int, torch.Tensor] = {}  # of each frame, (B, C)

    def committed(self, frames: list[int], latents: torch.Tensor) -> torch.Tensor:
        """The mean of each frame over height and width, (B, frames, C)."""
        return latents.float().mean(dim=(-2, -1)).transpose(1, 2)

    def after(self, history: RunHistory) -> "LatentMemory":
        known = copy.copy(self)
        known.means = history.notes
        return known

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        sink = [frame for frame in held if frame < self.num_sink_frames]
        window = self.window_size - self.num_memory_frames
        newest = [frame for frame in sink_and_newest(held, new, window, self.num_sink_frames) if frame not in sink]
        left = max(new[-1] + 1 - self.window_size, 0)  # frames that have left make room for slots
        found = self.found(new)
        slots = [frame - left for frame in newest]
        own = [frame - left for frame in new]
        return View([*sink, *found, *newest], [*sink, *[0] * len(found), *slots], own)

    def found(self, new: list[int]) -> list[list[int]]:
        """The most similar frames, best first: one list for each place of the memory, with a frame for each video."""
        end = new[0] - self.window_size + self.num_sink_frames - self.num_excluded_frames
        candidates = list(range(self.num_sink_frames, end))
        if not candidates:
            return []
        last = self.means[new[0] - 1]  # (B, C)
        similarity = F.cosine_similarity(torch.stack([self.means[frame] for frame in candidates]), last, dim=-1)
        best = similarity.topk(min(self.num_memory_frames, len(candidates)), dim=0).indices  # (found, B)
        return [[candidates[place] for place in row] for row in best.tolist()]

    def check(self, longest: int, carried: str) -> None:
        shortest = self.num_sink_frames + self.num_memory_frames + longest
        valid = f">= {shortest}: {self.num_sink_frames} sink frames, {self.num_memory_frames} found ones and {carried}"
        check(self.window_size >= shortest, "window_size", self.window_size, valid)


class IdForcing(Layout):
    """ID-Forcing (In-Distribution-Forcing/ID-Forcing): after some native chunks, chunks of the past are encoded alone, at
    the positions of a window; the last one may be encoded again behind those before it.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`]; positions are slots of the window.
        re_encode (`bool`): whether a commit reads the chunks before it, but for the sink.
        num_native_chunks (`int`): first chunks, which read all of the past.
    """

    one_chunk_a_pass = True
    for_heads = False
    transitions = ("keep",)  # the others would mix both ways to encode a chunk

    def __init__(
        self,
        window_size: int = 12,
        num_sink_frames: int = 3,
        re_encode: bool = True,
        num_native_chunks: int = 7,
    ):
        check_int("window_size", window_size, 1)
        check_int("num_sink_frames", num_sink_frames, 0)
        check_bool("re_encode", re_encode)
        check_int("num_native_chunks", num_native_chunks, 1)
        self.window_size = window_size
        self.num_sink_frames = num_sink_frames
        self.re_encode = re_encode
        self.num_native_chunks = num_native_chunks

    def is_native(self, new: list[int], ahead: int = 0) -> bool:
        """Whether a chunk, or the one that many chunks ahead of it, is native."""
        return new[0] + ahead * len(new) < self.num_native_chunks * len(new)

    def recent(self, held: list[int], new: list[int], window_size: int) -> list[int]:
        newest = sink_and_newest(held, new, window_size, self.num_sink_frames)
        return [frame for frame in newest if frame >= self.num_sink_frames]

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        return held if self.is_native(new) else sink_and_newest(held, new, self.window_size, self.num_sink_frames)

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        sink = [frame for frame in held if frame < self.num_sink_frames]
        frames = sink + self.recent(held, new, self.window_size)
        if pass_.kind == "self":
            frames = []
        elif pass_.kind == "commit" and not self.is_native(new, 1):
            frames = self.recent(held, new, self.window_size - len(new)) if self.re_encode else []
        elif self.is_native(new):
            return View(held, held, new)
        slots = list(range(len(frames) + len(new)))
        return View(frames, slots[: len(frames)], slots[len(frames) :])

    def recommit(self, held: list[int], new: list[int]) -> list[int]:
        """The chunk before, where it was not encoded alone."""
        if self.is_native(new, 1) or not (self.re_encode or self.is_native(new)):
            return []
        return [frame for frame in held if frame >= max(new[0] - len(new), self.num_sink_frames)]

    def check(self, longest: int, carried: str) -> None:
        shortest = self.num_sink_frames + 2 * longest
        valid = f"from {shortest} to {shortest + longest}: {self.num_sink_frames} sink frames, {carried} and one or two before it"
        check(shortest <= self.window_size <= shortest + longest, "window_size", self.window_size, valid)


class Shots(Layout):
    """LongLive 2 (NVlabs/LongLive) with several shots: positions jump at a shot, whose first frames become a second sink.
    Meant for the transition `shot`.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`]; each sink has this size.
        shot_offset (`int`): by how much positions jump at a shot.
        clean_recache (`bool`): whether the first commit of a shot drops all of the past but the sink.
    """

    one_chunk_a_pass = True
    for_heads = False
    transitions = ("keep", "shot")  # the others would drop or re-encode a sink

    def __init__(
        self,
        window_size: int = 12,
        num_sink_frames: int = 3,
        shot_offset: int = 8,
        clean_recache: bool = False,
    ):
        check_int("window_size", window_size, 1)
        check_int("num_sink_frames", num_sink_frames, 0)
        check_int("shot_offset", shot_offset, 0)
        check_bool("clean_recache", clean_recache)
        self.window_size = window_size
        self.num_sink_frames = num_sink_frames
        self.shot_offset = shot_offset
        self.clean_recache = clean_recache
        self.shots: list[int] = []  # first frame of each

    def after(self, history: RunHistory) -> "Shots":
        known = copy.copy(self)
        known.shots = list(history.shots)
        return known

    def sink(self, held: list[int]) -> list[int]:
        starts = [0, *self.shots[-1:]]
        return [frame for frame in held if any(0 <= frame - start < self.num_sink_frames for start in starts)]

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        start = max((shot for shot in self.shots if shot < new[0]), default=0)
        size = min(self.num_sink_frames, len(new))
        pinned = [frame for frame in held if frame < self.num_sink_frames or 0 <= frame - start < size]
        if self.clean_recache:
            held = [frame for frame in held if frame in pinned or frame >= start]
        free = [frame for frame in held if frame not in pinned]
        newest = free[max(len(pinned) + len(free) + len(new) - self.window_size, 0) :]
        return [frame for frame in held if frame in pinned or frame in newest]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        frames = held
        if self.clean_recache and pass_.kind == "commit" and new[0] in self.shots:
            frames = [frame for frame in held if frame < self.num_sink_frames]
        return View(frames, self.positions(frames), self.positions(new))

    def positions(self, frames: list[int]) -> list[int]:
        return [frame + self.shot_offset * sum(shot <= frame for shot in self.shots) for frame in frames]

    def check(self, longest: int, carried: str) -> None:
        shortest = 2 * self.num_sink_frames + longest
        valid = f">= {shortest}: two sinks of {self.num_sink_frames} frames and {carried}"
        check(self.window_size >= shortest, "window_size", self.window_size, valid)
