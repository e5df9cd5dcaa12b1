# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""When to trim: the adaptive gate of TokenTrim (arXiv 2602.00268), equations 7 and 8, one for each video of a batch."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from .tokentrim_stability import severity, summarize, token_drift, unstable_tokens


@dataclass
class Decision:
    """What the gate saw in one chunk of one video, and what was done about it. Plain types: `vars()` is JSON.

    Args:
        chunk (`int`): index of the chunk.
        severity (`float`, *optional*): D_t of the first attempt (eq. 6); `None` where there is nothing to compare with.
        threshold (`float`, *optional*): mu_t + lambda sigma_t (eq. 8); `None` while the gate is closed.
        trim (`bool`): whether tokens were evicted and the chunk generated again.
        tokens (`list[int]`): grid indices of the evicted tokens, ascending.
        drift (`list[float]`, *optional*): d_i of the first attempt, one for each token of the grid (eq. 5).
        regenerated_severity (`float`, *optional*): D_t of the last attempt, where that is not the first.
        quarantined (`bool`): whether no later chunk reads this one.
    """

    chunk: int
    severity: float | None = None
    threshold: float | None = None
    trim: bool = False
    tokens: list[int] = field(default_factory=list)
    drift: list[float] | None = None
    regenerated_severity: float | None = None
    quarantined: bool = False


class SeverityGate:
    """Running statistics of one video's accepted severities, and the threshold that follows from them (eq. 7, 8).

    Args:
        drift_sensitivity (`float`): lambda: how many standard deviations above the mean are abnormal.
        warmup_chunks (`float`): T_warm: the gate opens once this many severities are recorded; `math.inf` never.
        spread_floor (`float`): the least that sigma_t is taken for, as a share of mu_t; the paper has none.
    """

    def __init__(self, drift_sensitivity: float, warmup_chunks: float, spread_floor: float = 0.0):
        self.drift_sensitivity = drift_sensitivity
        self.warmup_chunks = warmup_chunks
        self.spread_floor = spread_floor
        self.severities: list[float] = []

    @property
    def threshold(self) -> float | None:
        """mu_t + lambda sigma_t with the population standard deviation; `None` while the gate is closed."""
        if len(self.severities) < max(self.warmup_chunks, 1):
            return None
        severities = torch.tensor(self.severities, dtype=torch.float64)
        mean, spread = severities.mean(), severities.std(correction=0)
        return float(mean + self.drift_sensitivity * torch.maximum(spread, self.spread_floor * mean))

    def record(self, severity: float) -> None:
        """Take the severity of an accepted chunk into the statistics."""
        self.severities.append(severity)


class TokenTrimPolicy:
    """Algorithm 1's judgement, chunk by chunk: `review` each attempt until nothing is condemned, then `accept`.

    Args:
        patch_size (`tuple[int, int, int]`): the transformer's patch, which makes the grid of tokens.
        num_videos (`int`): B: each video has statistics and decisions of its own.
        prune_fraction (`float`): p: the share of the grid that counts as unstable.
        drift_sensitivity (`float`): lambda of eq. 8.
        warmup_chunks (`float`): T_warm; `math.inf` keeps the gate shut, so that severities are only measured.
        max_regenerations (`int`): R: attempts at a chunk after the first.
    """

    def __init__(
        self,
        patch_size: tuple[int, int, int],
        num_videos: int,
        prune_fraction: float = 0.1,
        drift_sensitivity: float = 2.0,
        warmup_chunks: float = 2,
        max_regenerations: int = 1,
    ):
        self.patch_size = patch_size
        self.prune_fraction = prune_fraction
        self.max_regenerations = max_regenerations
        self.gates = [SeverityGate(drift_sensitivity, warmup_chunks) for _ in range(num_videos)]
        self._open_chunk(0)

    def review(self, previous: torch.Tensor | None, attempt: torch.Tensor) -> dict[int, list[int]]:
        """Judge an attempt at the current chunk against the chunk before it.

        Args:
            previous (`torch.Tensor`, *optional*): accepted latents of the chunk before, (B, C, T, H, W).
            attempt (`torch.Tensor`): latents of this attempt, (B, C, T, H, W).

        Returns:
            `dict[int, list[int]]`: for each video that has to be generated again, the grid tokens to evict first.
        """
        if previous is None:
            return {}
        drift = token_drift(summarize(attempt, self.patch_size), summarize(previous, self.patch_size))
        tokens = unstable_tokens(drift, self.prune_fraction)
        severities = severity(drift, tokens)

        condemned = {}
        for video in self._under_review:
            decision = self._decisions[video]
            if decision.trim:
                decision.regenerated_severity = severities[video].item()
            else:
                decision.severity, decision.drift = severities[video].item(), drift[video].tolist()
                decision.threshold = self.gates[video].threshold
            abnormal = decision.threshold is not None and severities[video].item() > decision.threshold
            if abnormal and self._attempts < self.max_regenerations:
                condemned[video] = tokens[video].tolist()
                decision.trim = True
                decision.tokens = sorted({*decision.tokens, *condemned[video]})
        self._under_review = list(condemned)
        self._attempts += 1
        return condemned

    def accept(self, quarantined: Collection[int] = ()) -> list[Decision]:
        """Close the current chunk: its severities enter the statistics (algorithm 1); one decision for each video.

        Args:
            quarantined (`Collection[int]`): videos whose chunk no later one reads.
        """
        decisions = self._decisions
        for video, (gate, decision) in enumerate(zip(self.gates, decisions)):
            decision.quarantined = video in quarantined
            accepted = decision.severity if decision.regenerated_severity is None else decision.regenerated_severity
            if accepted is not None:
                gate.record(accepted)
        self._open_chunk(decisions[0].chunk + 1)
        return decisions

    def _open_chunk(self, index: int) -> None:
        self._decisions = [Decision(index) for _ in self.gates]
        self._under_review = list(range(len(self.gates)))
        self._attempts = 0
