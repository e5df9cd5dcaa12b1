# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a chunk is compared with, and which of its tokens count as drifted. The chunk before and the same place are the
paper's (arXiv 2602.00268); the others are ours."""

from dataclasses import dataclass

import torch

from .outliers import outlier_threshold
from .stability import token_drift


@dataclass(frozen=True)
class Reference:
    """Which chunk the others are compared with, and which severities say what is normal.

    Args:
        moves (`bool`): whether every accepted chunk is the reference of the next one, and its severity counts. If not, the
            reference stays, and the first severities count.
        settling (`int`): chunks after a change of prompt until one of them is the reference.
        spread_floor (`float`): lower bound of the severities' standard deviation, as a share of their mean.
    """

    moves: bool
    settling: int
    spread_floor: float

    def takes(self, entered: bool, is_known: bool, num_new: int | None) -> bool:
        """Whether a finished chunk becomes the reference.

        Args:
            entered (`bool`): whether the chunk entered the context.
            is_known (`bool`): whether there is a reference.
            num_new (`int`, *optional*): how many chunks of a new scene there are, if they are counted.
        """
        if self.moves:
            return entered or not is_known
        return entered and not is_known and (num_new is None or num_new >= self.settling)

    def threshold(self, severities: list[float], sensitivity: float, warmup: int) -> float | None:
        """mu + lambda sigma (eq. 7, 8) of the severities that count; `None` during the warm-up."""
        counted = severities if self.moves else severities[: max(warmup, 1)]
        return outlier_threshold(counted, sensitivity, warmup, self.spread_floor)


REFERENCES = {
    "previous": Reference(moves=True, settling=0, spread_floor=0.0),
    "first": Reference(moves=False, settling=6, spread_floor=0.1),
}

NEW = -torch.inf  # the drift of a token that is new, and so cannot have drifted
REACH = 0.75  # of a token to its relative in the reference: root mean square over its values


def nearest_drift(summary: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Distance of each token to the nearest one of the reference, anywhere in the picture: (B, N, D), (B, M, D) -> (B, N).
    A token that is too far from all of them has no relative there: it is `NEW`."""
    nearest = torch.cdist(summary, reference).min(dim=-1).values
    return nearest.where(nearest <= REACH * summary.shape[-1] ** 0.5, NEW)


CRITERIA = {"same_place": token_drift, "nearest": nearest_drift}
