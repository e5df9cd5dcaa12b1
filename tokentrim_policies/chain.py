# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The policies of a rollout: a chain of them for each video of a batch."""

import copy
import json
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch

from ..tokentrim_checks import check, plain
from .policy import ContextPolicy, state_holder


# The facts of every chunk, with any method.
DECISION = {
    "severity": None,
    "threshold": None,
    "trim": False,
    "tokens": [],
    "regenerated_severity": None,
    "quarantined": False,
    "reanchored": None,
}


RESERVED = ("chunk", "trim", "tokens", "quarantined", "prompt_changed")  # facts that the rollout states


def plain_state(policy: ContextPolicy) -> dict:
    """The saved state of a policy: a copy of its attributes, without those that start with an underscore."""
    attributes = vars(state_holder(policy))
    return {name: copy.deepcopy(value) for name, value in attributes.items() if not name.startswith("_")}


class ContextPolicies:
    """A chain of policies for each video of a batch, as the rollout sees them.

    Every policy reviews every attempt, and all tokens that they return are evicted: before another attempt, or before the
    next chunk. Each policy commits what the policy before it returned; once one returns `None`, the others are not asked.

    Args:
        chain (`Sequence[ContextPolicy]`): in order; they are copied for each video.
        num_videos (`int`): B.
        grid (`tuple[int, int]`): tokens of a latent frame, (height, width).
        patch_size (`tuple[int, int, int]`): the transformer's.

    Attributes:
        entered (`list[bool]`): whether the chunk at hand entered the context of each video.
        leaving (`dict[int, list[int]]`): grid tokens that leave before the next chunk, by video.
    """

    def __init__(
        self,
        chain: Sequence[ContextPolicy],
        num_videos: int,
        grid: tuple[int, int],
        patch_size: tuple[int, int, int] = (1, 2, 2),
    ):
        self.num_tokens = grid[0] * grid[1]
        self.patch_size = patch_size
        self._chain = copy.deepcopy(list(chain))
        self.chains = self._new_chains(num_videos)
        self._open_chunk(0)

    def observe(self, latents: torch.Tensor) -> None:
        """Pass a chunk that was given, (B, C, T, H, W), to all policies."""
        for policies, chunk in zip(self.chains, latents):
            for policy in policies:
                policy.observe(chunk)

    def review(self, judged: torch.Tensor) -> dict[int, list[int]]:
        """Ask all policies about an attempt.

        Args:
            judged (`torch.Tensor`): its latents, (B, C, T, H, W).

        Returns:
            `dict[int, list[int]]`: grid tokens to evict, for each video that must be generated again.
        """
        unstable = {}
        for video in self._under_review:
            again, later = set(), set()
            for policy in self.chains[video]:
                asked = self._check_tokens(policy, policy.review(judged[video].clone()))
                if not policy.regenerate:
                    later |= asked
                elif self._attempts < policy.max_regenerations:
                    again |= asked
            self.leaving[video] = sorted(later)  # as the last attempt is judged
            if again:
                unstable[video] = sorted(again)
        self._under_review = list(unstable)
        self._attempts += 1
        return unstable

    def evicted(self, tokens: dict[int, list[int]]) -> None:
        """Record the grid tokens that left each video's context; a review after this one is of these videos."""
        self._under_review = list(tokens)
        for video, indices in tokens.items():
            decision = self._decisions[video]
            decision["trim"], decision["tokens"] = True, sorted({*decision["tokens"], *indices})

    def commit(self, latents: torch.Tensor) -> torch.Tensor:
        """What enters the context instead of accepted latents, (B, C, T, H, W); `entered` says for which videos."""
        context = latents.clone()
        for video, policies in enumerate(self.chains):
            chunk = latents[video]
            for policy in policies:  # each gets a copy, which it may write into and keep
                chunk = self._check_latents(policy, policy.commit(chunk.clone()), latents[video])
                if chunk is None:
                    self.entered[video] = False
                    break
            else:
                context[video] = chunk
        return context

    def close(self) -> list[dict]:
        """Finish the chunk: one decision for each video."""
        for policies, decision, entered in zip(self.chains, self._decisions, self.entered):
            decision["quarantined"] = not entered
            for policy in policies:
                decision.update(self._check_facts(policy, policy.close(entered)))
        decisions = self._decisions
        self._open_chunk(self._index + 1)
        return decisions

    def prompt_changed(self, videos: Iterable[int]) -> None:
        """A new scene begins in some videos."""
        for video in videos:
            self._decisions[video]["prompt_changed"] = True
            for policy in self.chains[video]:
                policy.prompt_changed()

    def state_dict(self) -> dict:
        """The state between two chunks."""
        chains = [[[type(policy).__name__, plain_state(policy)] for policy in chain] for chain in self.chains]
        return {"index": self._index, "chains": chains}

    def load_state_dict(self, state: dict) -> None:
        known = [[type(policy).__name__ for policy in chain] for chain in self.chains]
        saved = [[name for name, _ in chain] for chain in state["chains"]]
        check(saved == known, "state", saved, f"of a run of the same method and batch, {known}")
        self.chains = self._new_chains(len(known))  # derived attributes are computed again
        for policies, states in zip(self.chains, state["chains"]):
            for policy, (_, attributes) in zip(policies, states):
                vars(state_holder(policy)).update(copy.deepcopy(attributes))
        self._open_chunk(state["index"])

    def try_out(self, chunk: torch.Tensor, known: Iterable[type]) -> None:
        """Let copies of the policies of `known` classes see a chunk, (B, C, T, H, W), so that a loaded state that does not
        fit its shape raises before a run continues. A user's policies are left alone: calls may have effects elsewhere."""
        for policies, latents in zip(self.chains, chunk):
            for policy in [copy.deepcopy(each) for each in policies if type(each) in known]:
                policy.review(latents)
                policy.commit(latents)
                policy.close(True)

    def _new_chains(self, num_videos: int) -> list[list[ContextPolicy]]:
        chains = [copy.deepcopy(self._chain) for _ in range(num_videos)]
        for video, policies in enumerate(chains):
            for policy in map(state_holder, policies):
                policy.video, policy.patch_size = video, self.patch_size
        return chains

    def _open_chunk(self, index: int) -> None:
        self._index = index
        self._attempts = 0
        self._under_review = list(range(len(self.chains)))
        self._decisions = [{"chunk": index, **copy.deepcopy(DECISION)} for _ in self.chains]
        self.entered = [True] * len(self.chains)
        self.leaving: dict[int, list[int]] = {}

    def _place(self, policy: Any) -> str:
        return f"chunk {self._index}: {type(policy).__name__}"

    def _check_tokens(self, policy: Any, tokens: Any) -> set[int]:
        name, valid = f"{self._place(policy)}.review", f"grid tokens from 0 to {self.num_tokens - 1}"
        tokens = tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens
        check(isinstance(tokens, Iterable) and not isinstance(tokens, (str, dict)), name, tokens, valid, TypeError)
        tokens = list(tokens)
        whole = all(isinstance(token, Integral) and not isinstance(token, bool) for token in tokens)  # nor a mask
        check(whole, name, tokens, valid, TypeError)
        check(all(0 <= token < self.num_tokens for token in tokens), name, tokens, valid)
        return set(map(int, tokens))

    def _check_facts(self, policy: Any, facts: Any) -> dict:
        name = f"{self._place(policy)}.close"
        check(isinstance(facts, dict), name, facts, "a dict", TypeError)
        check(
            not set(facts) & set(RESERVED),
            name,
            list(facts),
            f"a dict without {', '.join(RESERVED)}, which the rollout states",
        )
        facts = plain(facts)
        try:
            json.dumps(facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{name}` must be a dict of finite numbers, texts, lists and dicts: {error}.") from None
        return facts

    def _check_latents(self, policy: Any, latents: Any, accepted: torch.Tensor) -> torch.Tensor | None:
        if latents is None:
            return None
        name, valid = f"{self._place(policy)}.commit", f"latents of shape {tuple(accepted.shape)}, finite, or None"
        check(isinstance(latents, torch.Tensor), name, latents, valid, TypeError)
        check(latents.shape == accepted.shape and bool(torch.isfinite(latents).all()), name, latents, valid)
        return latents.detach()
