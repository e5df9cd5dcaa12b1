# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""When to trim: TokenTrim's adaptive gate (arXiv 2602.00268, section 4, algorithm 1), for one video."""

import torch

from ..tokentrim_checks import check, check_bool, check_choice, check_int, check_number
from .policy import ContextPolicy
from .references import CRITERIA, REFERENCES
from .stability import severity, summarize, unstable_tokens


DRIFT_SIGNALS = ("final", "first_step")


class SeverityMonitor(ContextPolicy):
    """Measures how far each chunk moved from the one before it (eq. 4 to 6), and accepts everything.

    Decisions gain `severity`: D_t of the first attempt (`None` without a chunk to compare with),
    `regenerated_severity`: D_t of the last attempt, where that is not the first, and `threshold`: mu_t + lambda sigma_t
    (`None` while the gate is closed).

    Args:
        drift_signal (`str`, defaults to `"final"`): what is compared, as in [`TokenTrim`].
    """

    prune_fraction = 0.1
    reference = "previous"
    criterion = "same_place"

    def __init__(self, drift_signal: str = "final"):
        check_choice("drift_signal", drift_signal, DRIFT_SIGNALS)
        self.drift_signal = drift_signal
        self.previous: torch.Tensor | None = None  # what the reference was judged by, (C, T, H, W)
        self.num_new: int | None = None  # chunks of a new scene, until one of them is the reference
        self.draft: torch.Tensor | None = None  # the last attempt at the chunk at hand
        self.facts: dict = {}
        self._drift: torch.Tensor | None = None  # d_i of the first attempt, (num_tokens,)

    def observe(self, chunk: torch.Tensor) -> None:
        self.draft = chunk if self.drift_signal == "final" else None  # no x0 prediction of a first step
        self.previous = self.num_new = None

    def review(self, draft: torch.Tensor) -> list[int]:
        """The grid tokens to evict before another attempt; none accepts this one."""
        self.draft = draft
        if self.previous is None:
            return []
        current, previous = (summarize(latents[None], self.patch_size) for latents in (draft, self.previous))
        drift = CRITERIA[self.criterion](current, previous)  # (1, num_tokens)
        tokens = unstable_tokens(drift, self.prune_fraction)
        measured = severity(drift.clamp_min(0), tokens).item()
        if self.facts:
            self.facts["regenerated_severity"] = measured
        else:
            self._drift = drift[0]
            self.facts = {"severity": measured, "threshold": self.threshold()}
        drifted = tokens[0][drift[0, tokens[0]].isfinite()]  # new tokens stay
        return drifted.tolist() if self.is_abnormal(measured) else []

    def threshold(self) -> float | None:
        return None

    def is_abnormal(self, measured: float) -> bool:
        return False

    def commit(self, chunk: torch.Tensor) -> torch.Tensor:
        if self.drift_signal == "final":
            self.draft = chunk  # as the policies before this one have it
        return chunk

    def prompt_changed(self) -> None:
        is_new = self.previous is not None or self.num_new is not None  # not so before the first chunk
        self.previous, self.num_new = None, 0 if is_new else None  # the next chunk is meant to differ

    def close(self, entered: bool) -> dict:
        facts, self.facts = self.facts, {}
        rule = REFERENCES[self.reference]
        if self.num_new is not None:
            self.num_new += 1
        if rule.takes(entered, self.previous is not None, self.num_new):
            self.previous, self.num_new = self.draft, None
        self.draft = None
        return facts


class TokenDrift(SeverityMonitor):
    """Reports how far each token moved, for pictures of drift on the grid: `method=["token_drift", "tokentrim"]`.

    Decisions gain `drift`: d_i of the first attempt (eq. 5), a list with one number for each token of the grid, row by
    row; `None` where there is nothing to compare with.

    Args:
        drift_signal (`str`, defaults to `"final"`): what is compared, as in [`TokenTrim`].
    """

    def close(self, entered: bool) -> dict:
        is_known = bool(super().close(entered))
        return {"drift": self._drift.tolist() if is_known else None}


class TokenTrim(SeverityMonitor):
    """Algorithm 1: if a chunk's severity is abnormal, its most changed tokens leave the context, and it is generated again.

    The first five settings are the paper's, the others ours.

    Args:
        prune_fraction (`float`, defaults to `0.1`): p, the share of the token grid that counts as unstable.
        drift_sensitivity (`float`, defaults to `2.0`):
            lambda: severities above mean + lambda * standard deviation of the accepted ones are abnormal.
        warmup_chunks (`int`, defaults to `2`): T_warm, accepted severities before the gate opens.
        max_regenerations (`int`, defaults to `1`): R, attempts at a chunk after the first.
        drift_signal (`str`, defaults to `"final"`):
            What the gate compares: `"final"`, finished chunks; `"first_step"`, the x0 predictions of their first
            denoising step, so that another attempt costs one step instead of all.
        prune_weight (`float`, defaults to `0.0`):
            What a key of an unstable token counts for from then on, of one, multiplied at each trim. At 0 its keys leave the
            context, as in the paper.
        reference (`str`, defaults to `"previous"`):
            What a chunk is compared with: `"previous"`, the chunk before, as in the paper; `"first"`, the first chunk of the
            video or the last one that was given, and the mean and deviation are those of the first `warmup_chunks`
            severities. After a change of prompt, the sixth chunk of the new scene becomes the reference.
        criterion (`str`, defaults to `"same_place"`):
            What a token's drift is its distance to: `"same_place"`, the reference's token at its place, as in the paper;
            `"nearest"`, the reference's nearest token, and tokens without a near one are new and stay ([`nearest_drift`]).
        regenerate (`bool`, defaults to `True`):
            Whether an abnormal chunk is generated again. If not, the unstable tokens leave before the next chunk, which
            costs no call.
    """

    def __init__(
        self,
        prune_fraction: float = 0.1,
        drift_sensitivity: float = 2.0,
        warmup_chunks: int = 2,
        max_regenerations: int = 1,
        drift_signal: str = "final",
        prune_weight: float = 0.0,
        reference: str = "previous",
        criterion: str = "same_place",
        regenerate: bool = True,
    ):
        valid = "a number between 0 and 1, both excluded"
        check_number("prune_fraction", prune_fraction, lambda share: 0 < share < 1, valid)
        check_number("drift_sensitivity", drift_sensitivity, lambda value: value >= 0, "a finite number >= 0")
        check_int("warmup_chunks", warmup_chunks, 0)
        check_int("max_regenerations", max_regenerations, 0)
        check_number("prune_weight", prune_weight, lambda value: 0 <= value < 1, "a number from 0 to 1, 1 excluded")
        check_choice("reference", reference, tuple(REFERENCES))
        check_choice("criterion", criterion, tuple(CRITERIA))
        check_bool("regenerate", regenerate)
        super().__init__(drift_signal)
        self.prune_fraction = prune_fraction
        self.drift_sensitivity = drift_sensitivity
        self.warmup_chunks = warmup_chunks
        self.max_regenerations = max_regenerations
        self.prune_weight = prune_weight
        self.reference = reference
        self.criterion = criterion
        self.regenerate = regenerate
        self.severities: list[float] = []  # of accepted chunks, since the last change of prompt

    def check(self, num_tokens: int) -> None:
        """Every trim of a drifting video names tokens again: some must be left."""
        count = unstable_tokens(torch.zeros(1, num_tokens), self.prune_fraction).shape[1]
        valid = f"a smaller share with reference {self.reference!r}: {count} of {num_tokens} tokens leave no context"
        check(self.reference == "previous" or count < num_tokens, "prune_fraction", self.prune_fraction, valid)

    def threshold(self) -> float | None:
        """mu_t + lambda sigma_t (eq. 7, 8); `None` while the gate is closed."""
        return REFERENCES[self.reference].threshold(self.severities, self.drift_sensitivity, self.warmup_chunks)

    def is_abnormal(self, measured: float) -> bool:
        return self.facts["threshold"] is not None and measured > self.facts["threshold"]

    def prompt_changed(self) -> None:
        super().prompt_changed()
        self.severities = []  # a new scene is judged by its own

    def close(self, entered: bool) -> dict:
        facts = super().close(entered)
        if facts:  # the accepted attempt's enters the statistics
            self.severities.append(facts.get("regenerated_severity", facts["severity"]))
        return facts
