# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How far a stream is, and what its method did so far: in a sentence, in a bar, and as HTML."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..tokentrim_frames.summary import count_events, tell_events
from .plan import Sizes


class Progress:
    """Chunks, seconds and events of a run since this process has it.

    Args:
        sizes ([`Sizes`]): the sizes of the run.
        first_chunk (`int`): the chunk at which this process takes the run over.
        fps (`float`): frames per second of its videos.
    """

    def __init__(self, sizes: Sizes, first_chunk: int, fps: float):
        self.fps, self.num_chunks = fps, first_chunk
        self.num_frames = sum(map(sizes.chunk_frames, range(first_chunk)))
        self._events: dict[int, Counter] = {}  # by chunk
        self.planned = None if sizes.is_endless else (len(sizes.chunk_partition), sizes.num_frames)
        self.num_videos, self.counts = sizes.num_videos, Counter()
        self._chunk_frames = sizes.chunk_frames

    def add(self, chunk: Any) -> None:
        """A chunk is finished."""
        self.num_chunks = chunk.index + 1
        self.num_frames += self._chunk_frames(chunk.index)
        self._events[chunk.index] = count_events(chunk.decisions)
        self.counts += self._events[chunk.index]

    def cut_back(self, index: int) -> None:
        """The chunks from `index` on are taken back."""
        for chunk in range(index, self.num_chunks):
            self.num_frames -= self._chunk_frames(chunk)
            self.counts -= self._events.pop(chunk, Counter())
        self.num_chunks = min(index, self.num_chunks)

    def tell(self) -> str:
        """`12 of 40 chunks (3.0 of 10.0 s): 11 held, 0 trimmed, 0 quarantined`; of all videos of a batch together."""
        chunks, seconds = f"{self.num_chunks}", f"{self.num_frames / self.fps:.1f}"
        if self.planned is not None:
            chunks, seconds = f"{chunks} of {self.planned[0]}", f"{seconds} of {self.planned[1] / self.fps:.1f}"
        videos = "" if self.num_videos == 1 else f"{self.num_videos} videos, "
        return f"{videos}{chunks} chunks ({seconds} s): {tell_events(self.counts)}"


class ProgressBar:
    """Chunks, seconds of video, frames per second, what the method did, and memory."""

    def __init__(self, progress: Progress, disable: bool):
        self.progress, self.start = progress, (time.perf_counter(), progress.num_frames)
        total = None if progress.planned is None else progress.planned[0]
        self.bar = tqdm(total=total, initial=progress.num_chunks, unit="chunk", disable=disable)

    def update(self) -> None:
        """After each chunk."""
        progress, (begin, num_before) = self.progress, self.start
        rate = (progress.num_frames - num_before) / (time.perf_counter() - begin)
        told = [f"{progress.num_frames / progress.fps:.1f} s", f"{rate:.1f} frames/s", tell_events(progress.counts)]
        if (memory := resident_bytes()) is not None:
            told.append(f"{memory / 2**30:.2f} GiB")
        self.bar.set_postfix_str(", ".join(told))
        self.bar.update(progress.num_chunks - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def resident_bytes() -> int | None:
    """Memory of this process, on systems that report it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None
