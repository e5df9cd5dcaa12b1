# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Quarantine at commit, ours and not the paper's: a chunk that looks nothing like the one before it is never read again.

Where TokenTrim generates a suspicious chunk a second time, quarantine keeps it and goes on as if it had not been. What
it looks at does not follow motion: an object that moves takes its latent values along, a defect brings new ones.
"""

from collections.abc import Iterable

import torch

from .tokentrim_anchor import quantiles, resampled
from .tokentrim_policy import SeverityGate


WARMUP_CHUNKS = 4  # jumps on record before the gate opens
SPREAD_FLOOR = 0.1  # of the mean: what a few even jumps say about their spread is too little


def jump(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Distance of two chunks' distributions of values in each channel, given as `quantiles`, (C, any): Wasserstein-2,
    root mean square over channels. Blind to where in the chunk a value is."""
    return (ours - resampled(theirs, ours.shape[-1])).square().mean().sqrt().item()


class Quarantine:
    """Which videos of a batch have just had a chunk that no later one may read.

    A chunk is broken when its jump from the last sound one is abnormally large for this video. Never twice in a row:
    what stays was meant, what is gone again was a defect.

    Args:
        num_videos (`int`): B: each video is judged by itself.
        sensitivity (`float`, *optional*): how many standard deviations above the mean jump are abnormal; `None`: none.
    """

    def __init__(self, num_videos: int, sensitivity: float | None = None):
        self.sensitivity = sensitivity
        self.gates = [SeverityGate(sensitivity, WARMUP_CHUNKS, SPREAD_FLOOR) for _ in range(num_videos)]
        self.sound: list[torch.Tensor] | None = None  # quantiles of the last sound chunk of each video
        self.broken: set[int] = set()

    def trust(self, chunk: torch.Tensor) -> None:
        """Take a chunk, (B, C, T, H, W), for sound without a judgement: the first one, and what was given."""
        if self.sensitivity is not None:
            self.sound = list(quantiles(chunk))

    def judge(self, chunk: torch.Tensor) -> set[int]:
        """The videos whose chunk, (B, C, T, H, W), is broken."""
        if self.sensitivity is None:
            return set()
        if self.sound is None:
            self.trust(chunk)
            return set()
        broken = set()
        for video, (values, gate) in enumerate(zip(quantiles(chunk), self.gates)):
            distance, threshold = jump(values, self.sound[video]), gate.threshold
            if threshold is not None and distance > threshold and video not in self.broken:
                broken.add(video)
            else:
                gate.record(distance)
                self.sound[video] = values
        self.broken = broken
        return broken


def without(videos: Iterable[int], chunk: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """`chunk`, (B, ...), with the rows of some videos as they were before."""
    videos = list(videos)
    if not videos or before is None:
        return chunk
    chunk = chunk.clone()
    chunk[videos] = before[videos]
    return chunk
