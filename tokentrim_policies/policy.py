# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The contract of a method: what later chunks of one video may read."""

from collections.abc import Iterable
from typing import Any

import torch


class ContextPolicy:
    """What later chunks of one video may read. By default: everything, as it was generated.

    A method overrides some of the five verbs, and `check` if it cannot serve every rollout. For each chunk the rollout calls `review` once for every attempt, then
    `commit`, then `close`; a chunk that was given instead of generated is passed to `observe`. Latents are (C, T, H, W) of
    one video; the rollout copies a policy for each video of a batch.

    State is plain attributes (tensors, numbers, strings, lists and dicts of them), so that a run can be saved. Names with
    a leading underscore are derived from the others, and not saved.

    Attributes:
        video (`int`): index of the video in the batch, set by the rollout.
        patch_size (`tuple[int, int, int]`): the transformer's (frames, height, width) patch, set by the rollout.
        max_regenerations (`int`): how often `review` may ask for another attempt at a chunk.
        regenerate (`bool`): whether a chunk is generated again when `review` returns tokens. If not, they leave the context
            before the next chunk.
        drift_signal (`str`, *optional*): what `review` sees: `"final"`, finished chunks, or `"first_step"`, the x0
            predictions of their first step; `None` if either will do.
        prune_weight (`float`, *optional*): the weight of the tokens that `review` returns from then on, instead of 0;
            `None` if any will do.
        may_reject (`bool`): whether `commit` may return `None`, so that the context must be large enough for that.
    """

    video: int = 0
    patch_size: tuple[int, int, int] = (1, 2, 2)
    max_regenerations: int = 1
    regenerate: bool = True
    drift_signal: str | None = None
    prune_weight: float | None = None
    may_reject: bool = False

    def check(self, num_tokens: int) -> None:
        """Refuse a rollout that the policy cannot serve. By default it serves all.

        Args:
            num_tokens (`int`): tokens of a latent frame.

        Raises:
            `ValueError`: a setting does not fit; the message names it, its value and what is valid.
        """

    def observe(self, chunk: torch.Tensor) -> None:
        """Take a chunk that was given, not generated.

        Args:
            chunk (`torch.Tensor`): its latents, (C, T, H, W).
        """

    def review(self, draft: torch.Tensor) -> Iterable[int]:
        """Accept an attempt at a chunk, or name grid tokens to evict before another one.

        Args:
            draft (`torch.Tensor`): latents of the attempt, (C, T, H, W); what they are is `drift_signal`.

        Returns:
            `Iterable[int]`: indices of the token grid, row-major, to evict from the context; empty to accept.
        """
        return ()

    def commit(self, chunk: torch.Tensor) -> torch.Tensor | None:
        """Decide what enters the context.

        Args:
            chunk (`torch.Tensor`): latents of the accepted chunk, (C, T, H, W), as the policies before this one left them.

        Returns:
            `torch.Tensor`, *optional*: latents of the same shape that enter the context instead; `None`: nothing enters.
        """
        return chunk

    def close(self, entered: bool) -> dict[str, Any]:
        """Finish a chunk.

        Args:
            entered (`bool`): whether it entered the context.

        Returns:
            `dict`: facts for `decisions[video][chunk]`, of plain JSON types.
        """
        return {}

    def prompt_changed(self) -> None:
        """Note that another prompt applies from the next chunk on."""


VERBS = ("observe", "review", "commit", "close", "prompt_changed")


class CompletedPolicy(ContextPolicy):
    """A user's object with the five verbs; attributes that it lacks are as in [`ContextPolicy`].

    Args:
        policy: the object. It holds the state, and gets `video` and `patch_size`.
    """

    def __init__(self, policy: Any):
        self.policy = policy
        self.drift_signal = getattr(policy, "drift_signal", None)
        self.prune_weight = getattr(policy, "prune_weight", None)
        self.may_reject = getattr(policy, "may_reject", False)
        self.regenerate = getattr(policy, "regenerate", True)

    @property
    def max_regenerations(self) -> int:
        return getattr(self.policy, "max_regenerations", ContextPolicy.max_regenerations)

    def check(self, num_tokens: int) -> None:
        check = getattr(self.policy, "check", None)
        if callable(check):
            check(num_tokens)

    def observe(self, chunk: torch.Tensor) -> None:
        self.policy.observe(chunk)

    def review(self, draft: torch.Tensor) -> Iterable[int]:
        return self.policy.review(draft)

    def commit(self, chunk: torch.Tensor) -> torch.Tensor | None:
        return self.policy.commit(chunk)

    def close(self, entered: bool) -> dict[str, Any]:
        return self.policy.close(entered)

    def prompt_changed(self) -> None:
        self.policy.prompt_changed()


def state_holder(policy: ContextPolicy) -> Any:
    """The object whose attributes are the state of a policy: the user's own, or the policy itself."""
    return policy.policy if isinstance(policy, CompletedPolicy) else policy
