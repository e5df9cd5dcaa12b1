# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The contract of a method: what later chunks of one video may read."""

from collections.abc import Iterable

import torch


class ContextPolicy:
    """What later chunks of one video may read. By default: everything, as it was generated.

    A method overrides some of the five verbs. Latents are (C, T, H, W) of one video; the rollout copies a policy for each
    video of a batch. State is plain attributes (tensors, numbers, strings, lists and dicts of them), so that a run can be
    saved; names with a leading underscore are derived, and left out.

    Attributes:
        video (`int`): which video of the batch, set by the rollout.
        patch_size (`tuple[int, int, int]`): the transformer's (frames, height, width) patch, set by the rollout.
        max_regenerations (`int`): how often `review` may ask for another attempt at a chunk.
        drift_signal (`str`, *optional*): what `review` sees: `"final"` or `"first_step"`; `None` where it does not matter.
        prune_weight (`float`, *optional*): what tokens that `review` asks for count for from then on, in the place of
            leaving; `None` where it does not matter.
        may_reject (`bool`): whether `commit` may return `None`, so that the context must be large enough for that.
    """

    video = 0
    patch_size = (1, 2, 2)
    max_regenerations = 1
    drift_signal: str | None = None
    prune_weight: float | None = None
    may_reject = False

    def observe(self, chunk: torch.Tensor) -> None:
        """Frames that were given, not generated: beyond doubt."""

    def review(self, draft: torch.Tensor) -> Iterable[int]:
        """Grid tokens, row-major, to evict from the context before another attempt; none accepts this one."""
        return ()

    def commit(self, chunk: torch.Tensor) -> torch.Tensor | None:
        """The latents that become context in the place of an accepted chunk; `None`: nothing of this chunk."""
        return chunk

    def close(self, entered: bool) -> dict:
        """The chunk is over: facts for `decisions[video][chunk]`, plain JSON types."""
        return {}

    def prompt_changed(self) -> None:
        """Another prompt serves from the next chunk on."""


VERBS = ("observe", "review", "commit", "close", "prompt_changed")
