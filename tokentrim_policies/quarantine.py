# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Quarantine at commit, ours and not the paper's: a chunk unlike the one before it is shown, but not read by later chunks.

TokenTrim generates a suspicious chunk again; quarantine rejects it and continues without it. The signal ignores motion: moving an object permutes latent values, a defect adds new ones.
"""

import torch

from ..tokentrim_checks import check_number
from .outliers import jump, outlier_threshold, quantiles
from .policy import ContextPolicy


WARMUP_JUMPS = 4  # accepted before a chunk can be rejected
SPREAD_FLOOR = 0.1  # of the mean: a few even jumps say too little about their spread


class Quarantine(ContextPolicy):
    """Rejects a chunk whose jump from the last accepted one is abnormally large for this video. Never two in a
    row, so that a lasting change enters and a brief defect does not.

    Args:
        sensitivity (`float`, defaults to `6.0`): standard deviations above the mean jump from which a jump is abnormal.
    """

    may_reject = True

    def __init__(self, sensitivity: float = 6.0):
        check_number("sensitivity", sensitivity, lambda value: value >= 0, "a finite number >= 0")
        self.sensitivity = sensitivity
        self.jumps: list[float] = []  # of accepted chunks, since the last change of prompt
        self.last_quantiles: torch.Tensor | None = None  # of the last accepted chunk
        self.rejected = False  # whether the chunk before was

    def observe(self, chunk: torch.Tensor) -> None:
        self.last_quantiles = quantiles(chunk)

    def prompt_changed(self) -> None:
        """The next chunk is meant to differ, and those after it are judged by the jumps of the new scene alone."""
        self.jumps, self.last_quantiles, self.rejected = [], None, False

    def commit(self, chunk: torch.Tensor) -> torch.Tensor | None:
        """The chunk, or `None` where it is rejected."""
        values = quantiles(chunk)
        if self.last_quantiles is not None:
            distance = jump(values, self.last_quantiles)
            threshold = outlier_threshold(self.jumps, self.sensitivity, WARMUP_JUMPS, SPREAD_FLOOR)
            self.rejected = threshold is not None and distance > threshold and not self.rejected
            if self.rejected:
                return None
            self.jumps.append(distance)
        self.last_quantiles = values
        return chunk
