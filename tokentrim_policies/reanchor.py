# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Re-anchoring at commit, ours and not the paper's: the context is held to the reference chunk.

Drift of a long rollout is mostly slow and global: every chunk differs a little from the one before it, and the next chunk
follows it. Moving the context back to the first chunk breaks that loop. The chunk that is shown stays as it was generated.
"""

import torch

from ..tokentrim_checks import check_choice, check_int, check_number
from .matching import MATCHINGS
from .outliers import magnitude, mean_offsets
from .policy import ContextPolicy


class Reanchor(ContextPolicy):
    """Holds a video's context to its reference: its first chunk, or the last one that was given.

    Only a change of prompt releases the video: `patience` chunks of the new scene pass unchanged, the reference is taken
    from them, and the chunk after them is held.

    With a tolerance, a change that a single prompt asks for can pass too. A held chunk starts from a context at the
    reference, so the change that holding removes from it measures how much the model resists. If the mean over the first
    `patience` held chunks exceeds the tolerance, the video is released and watched. While it is watched, a chunk beyond the
    tolerance becomes the next reference, and a video that stays within it for `patience` chunks is held again, under the
    same rule. Fast drift exceeds a tolerance as a change does: such videos are released by mistake.

    Decisions gain `reanchored`: `"held"`, `"watched"`, or `None` for a chunk that is the reference itself.

    Args:
        match (`str`, defaults to `"near"`):
            What is held. `"near"`: tokens that resemble some of the reference, but no new content ([`MatchNear`]);
            `"shift"`: the same after one offset of the whole chunk, for fine texture ([`MatchShift`]). All of the chunk:
            `"mean"`, `"moments"` (mean and standard deviation) or `"histogram"` (all values) of each latent channel;
            `"covariance"` (means, and covariance of all channels, in closed form) or `"distribution"` (all values) of all
            channels jointly.
        tolerance (`float`, *optional*):
            The largest change that holding removes, and the largest distance of a watched chunk from its reference, that
            still counts as drift: distance of the channels' means in standard deviations of the reference, root mean square
            over channels. The default `None`: every change within a scene counts as drift. 0.085 was measured.
        patience (`int`, defaults to `6`):
            Chunks of a new scene until it is held; with a tolerance, also chunks until a video is released.
        strength (`float`, defaults to `1.0`): how far a held chunk is moved to the match, 0 to 1.
    """

    def __init__(
        self,
        match: str = "near",
        tolerance: float | None = None,
        patience: int = 6,
        strength: float = 1.0,
    ):
        check_choice("match", match, tuple(MATCHINGS))
        check_int("patience", patience, 1)
        if tolerance is not None:
            check_number("tolerance", tolerance, lambda value: value > 0, "a finite number > 0, or None")
        check_number("strength", strength, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        self.match = match
        self.tolerance = tolerance
        self.patience = patience
        self.strength = strength
        self.reference: torch.Tensor | None = None  # (C, T, H, W)
        self.watched = False
        self.offsets: list[torch.Tensor] = []  # (C,), of the first chunks since the video was held or released
        self.num_new: int | None = None  # chunks of a new scene, until it is held
        self.outcome: str | None = None  # of the chunk at hand
        self._matching = None  # learned from the reference

    def observe(self, chunk: torch.Tensor) -> None:
        self._hold(chunk)

    def commit(self, chunk: torch.Tensor) -> torch.Tensor:
        """The held chunk; unchanged while the video is watched."""
        if self.reference is None:
            self.observe(chunk)
            return chunk
        if self.watched:
            self._settle(chunk)
        if not self.watched:
            matched = self._match(chunk)
            self._resist(chunk, matched)
        self.outcome = "watched" if self.watched else "held"
        if self.watched:
            return chunk
        return matched if self.strength == 1 else torch.lerp(chunk, matched, self.strength)

    def close(self, entered: bool) -> dict:
        outcome, self.outcome = self.outcome, None
        return {"reanchored": outcome}

    def prompt_changed(self) -> None:
        if self.reference is not None:
            self._watch(self.reference)
            self.num_new = 0

    def _hold(self, reference: torch.Tensor) -> None:
        self._refer_to(reference, watched=False)
        self.num_new = None

    def _watch(self, reference: torch.Tensor) -> None:
        self._refer_to(reference, watched=True)

    def _refer_to(self, reference: torch.Tensor, watched: bool) -> None:
        self.reference, self.watched, self.offsets, self._matching = reference, watched, [], None

    def _match(self, chunk: torch.Tensor) -> torch.Tensor:
        if self._matching is None:
            self._matching = MATCHINGS[self.match](self.reference[None])
        return self._matching(chunk[None])[0]

    def _resist(self, chunk: torch.Tensor, matched: torch.Tensor) -> None:
        """Release the video if holding removes too much."""
        if self.tolerance is None or len(self.offsets) == self.patience:
            return
        self.offsets = [*self.offsets, mean_offsets(chunk, matched)]
        if len(self.offsets) == self.patience and magnitude(torch.stack(self.offsets).mean(dim=0)) > self.tolerance:
            self._watch(chunk)

    def _settle(self, chunk: torch.Tensor) -> None:
        """Move the reference of a video that moves. Hold the video after `patience` chunks of a new scene, or when it
        stays."""
        self.offsets = [*self.offsets, mean_offsets(chunk, self.reference)]
        num_before, self.num_new = self.num_new, None if self.num_new is None else self.num_new + 1
        if num_before == self.patience:
            self._hold(self.reference)
        elif num_before == 0 or self.tolerance is None or magnitude(self.offsets[-1]) > self.tolerance:
            self._watch(chunk)  # without a tolerance, nothing says since when the video stays
        elif len(self.offsets) == self.patience:
            self._hold(self.reference)
