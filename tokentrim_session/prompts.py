# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Prompts, and their changes over time: from which chunk on, and what happens to the context."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..tokentrim_backbones.backbone import Limits
from ..tokentrim_checks import check, check_choice, check_int, check_tensor
from ..tokentrim_views.layout import Layout


TRANSITIONS = ("keep", "recache", "flush", "cut", "shot")
MAX_TOKENS = 100_000  # of a prompt


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call, each as texts or as embeddings, (prompts, text, dim).

    Args:
        prompt (`str` or `list[str]`, *optional*), prompt_embeds (`torch.Tensor`, *optional*): one of them is given.
        negative_prompt (`str` or `list[str]`, *optional*), negative_prompt_embeds (`torch.Tensor`, *optional*):
            for classifier-free guidance.
        max_sequence_length (`int`): tokens that a text is padded to.
    """

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    max_sequence_length: int

    def __len__(self) -> int:
        if isinstance(self.prompt, str):
            return 1
        return len(self.prompt_embeds if self.prompt is None else self.prompt)


@dataclass(frozen=True)
class EncodedPrompt:
    """Text embeddings, (B, text, dim), and negative ones with classifier-free guidance."""

    embeds: torch.Tensor
    negative_embeds: torch.Tensor | None = None

    def branches(self) -> list[torch.Tensor]:
        """Embeddings of each guidance branch, the unconditional one first."""
        return [embeds for embeds in (self.negative_embeds, self.embeds) if embeds is not None]


@dataclass(frozen=True)
class PromptChange:
    """Another prompt from a chunk on.

    Args:
        prompts (`list`): for each prompt of the call a text, embeddings (text, dim), or `None` where it stays.
        transition (`str`): one of `TRANSITIONS`.
        blend_chunks (`int`): chunks over which the embeddings move from the old to the new ones.
    """

    prompts: list
    transition: str = "keep"
    blend_chunks: int = 0


def make_change(prompt: Any, num_prompts: int, transition: str = "keep", blend_chunks: int = 0) -> PromptChange:
    """
    A change of the prompts of a call.

    Args:
        prompt (`str`, `list` or `torch.Tensor`):
            one for all, one for each (`None`: stays), or embeddings (B, text, dim).
        num_prompts (`int`): prompts of the call.
        transition (`str`), blend_chunks (`int`): see [`PromptChange`].
    """
    check_choice("prompt_transition", transition, TRANSITIONS)
    check_int("blend_chunks", blend_chunks, 0)
    if isinstance(prompt, str):
        prompts = [prompt] * num_prompts
    elif isinstance(prompt, torch.Tensor):
        check_tensor("prompt", prompt, 3, "(batch, text, dim)")
        prompts = list(prompt.expand(num_prompts, -1, -1) if len(prompt) == 1 else prompt)
    else:
        valid = f"a text, embeddings (batch, text, dim), or a list of {num_prompts} texts, None where one stays"
        texts = isinstance(prompt, (list, tuple)) and all(each is None or isinstance(each, str) for each in prompt)
        check(texts, "prompt", prompt, valid, TypeError)
        prompts = list(prompt)
    check(len(prompts) == num_prompts, "prompt", prompts, f"one for each of the {num_prompts} prompts")
    check_words("prompt", prompts)
    if transition != "keep":
        valid = "'keep' where only some videos of a batch change: the others' context would change with them"
        check(all(each is not None for each in prompts), "prompt_transition", transition, valid)
    return PromptChange(prompts, transition, blend_chunks)


def read_schedule(schedule: Any, transition: Any, blend_chunks: int, num_prompts: int) -> dict[int, PromptChange]:
    """
    The changes of a prompt schedule, by chunk.

    Args:
        schedule (`dict` or `list[dict]`):
            `{chunk: prompt}` in ascending order, prompts as in [`make_change`]; or one such dict for each prompt, empty
            or `None` for a prompt that does not change.
        transition (`str` or `dict`): one of `TRANSITIONS`, or `{chunk: transition}` for some of the chunks.
        blend_chunks (`int`): see [`PromptChange`].
        num_prompts (`int`): prompts of the call.
    """
    if isinstance(schedule, (list, tuple)):
        check(
            len(schedule) == num_prompts, "prompt_schedule", len(schedule), f"{num_prompts} dicts, one for each prompt"
        )
        by_prompt = [{} if each is None else each for each in schedule]  # without a change
        for each in by_prompt:
            _check_chunks("prompt_schedule", each, may_be_empty=True)
        chunks = sorted({chunk for each in by_prompt for chunk in each})
        schedule = {chunk: [each.get(chunk) for each in by_prompt] for chunk in chunks}
        if not schedule:
            return {}
    _check_chunks("prompt_schedule", schedule)
    if isinstance(transition, dict):
        _check_chunks("prompt_transition", transition)
    else:
        check_choice("prompt_transition", transition, TRANSITIONS)
        transition = dict.fromkeys((chunk for chunk in schedule if chunk > 0), transition)
    known = set(transition) <= set(schedule)
    check(known, "prompt_transition", sorted(transition), f"a dict of chunks of the schedule, {sorted(schedule)}")
    changes = {
        chunk: make_change(prompt, num_prompts, transition.get(chunk, "keep"), blend_chunks if chunk > 0 else 0)
        for chunk, prompt in schedule.items()
    }
    gaps = [after - before for before, after in zip(schedule, list(schedule)[1:])]
    valid = f"below the distance of two changes, {min(gaps, default=0)} chunks"
    check(blend_chunks < min(gaps, default=blend_chunks + 1), "blend_chunks", blend_chunks, valid)
    return changes


def check_change(change: PromptChange, layout: Layout, limits: Limits) -> None:
    """Refuse a transition that the layout or the backbone cannot make."""
    name, transition = "prompt_transition", change.transition
    served = layout.transitions
    check(transition in served, name, transition, f"one of {served} for {type(layout).__name__}")
    served = served if limits.transitions is None else limits.transitions
    check(transition in served, name, transition, f"{' or '.join(map(repr, served))} for {limits.model}")


def check_lengths(name: str, change: PromptChange, prompts: Prompts, text_dim: int) -> None:
    """Refuse texts and embeddings that are not as long as the prompts of chunk 0; `name` is the argument."""
    embeds, length = prompts.prompt_embeds, prompts.max_sequence_length
    if embeds is not None and embeds.shape[1] != length:
        valid = f"embeddings (batch, {embeds.shape[1]}, dim) like `prompt_embeds`, or pass `max_sequence_length="
        for prompt in change.prompts:
            check(not isinstance(prompt, str), name, prompt, f"{valid}{embeds.shape[1]}` with texts")
        length = embeds.shape[1]
    for prompt in change.prompts:
        fits = not isinstance(prompt, torch.Tensor) or prompt.shape == (length, text_dim)
        check(fits, name, prompt, f"texts, or embeddings ({length}, {text_dim}) of each, like those of chunk 0")


def check_unscheduled(transition: Any, blend_chunks: Any, is_stream: bool) -> None:
    """Refuse settings of changes in a call without `prompt_schedule`. In a stream, `set_prompt` takes the transition."""
    valid = f"None{', or one for all changes,' if is_stream else ''} without `prompt_schedule`"
    used = transition in (None, "keep") or (is_stream and isinstance(transition, str))
    check(used, "prompt_transition", transition, valid)
    check_choice("prompt_transition", transition or "keep", TRANSITIONS)
    check_int("blend_chunks", blend_chunks, 0)
    check(blend_chunks == 0, "blend_chunks", blend_chunks, "0 without `prompt_schedule`")


def blended(old: torch.Tensor, new: torch.Tensor, blend_chunks: int) -> list[torch.Tensor]:
    """Embeddings of the chunks from a change on: on a straight line from the old ones, the new ones last."""
    return [torch.lerp(old, new, (step + 1) / (blend_chunks + 1)) for step in range(blend_chunks)] + [new]


def check_prompts(prompts: Prompts, text_dim: int, is_guided: bool) -> None:
    """Refuse texts that are no texts, and embeddings that do not fit the model, the texts, or each other."""
    check_int("max_sequence_length", prompts.max_sequence_length, 1, maximum=MAX_TOKENS)
    for name, texts, embeds in _branches(prompts):
        check(embeds is None or texts is None, f"{name}_embeds", embeds, f"None where `{name}` is given")
        check(texts is None or isinstance(texts, (str, list)), name, texts, "a str or a list of str", TypeError)
        if embeds is not None:
            check_tensor(f"{name}_embeds", embeds, 3, "(batch, text, dim)")
            fits = len(embeds) > 0 and embeds.shape[-1] == text_dim
            check(fits, f"{name}_embeds", embeds, f"(batch, text, {text_dim})")
    embeds, negative_embeds = prompts.prompt_embeds, prompts.negative_prompt_embeds
    check(prompts.prompt is not None or embeds is not None, "prompt", prompts.prompt, "given, or `prompt_embeds`")
    if embeds is not None and negative_embeds is not None:
        valid = f"shaped like `prompt_embeds`, {tuple(embeds.shape)}"
        check(embeds.shape == negative_embeds.shape, "negative_prompt_embeds", negative_embeds, valid)
    if is_guided:
        _check_beside_text(prompts)
    num_prompts = max(len(prompts), 1)
    for name, texts, _ in _branches(prompts):
        if isinstance(texts, list):
            check(all(isinstance(text, str) for text in texts), name, texts, "a str or a list of str", TypeError)
            check(len(texts) == num_prompts, name, texts, f"a str or a list of {num_prompts}")
    check_words("prompt", prompts.prompt)


def check_words(name: str, texts: Any) -> None:
    """Refuse an empty text: a model draws something for it, which is hardly what was meant."""
    for text in [texts] if isinstance(texts, str) else texts or []:
        empty = isinstance(text, str) and not text.strip()
        check(not empty, name, text, "a text with words, or embeddings for a video without")


def _branches(prompts: Prompts) -> list[tuple[str, Any, Any]]:
    """Name, texts and embeddings of each guidance branch."""
    return [
        ("prompt", prompts.prompt, prompts.prompt_embeds),
        ("negative_prompt", prompts.negative_prompt, prompts.negative_prompt_embeds),
    ]


def _check_beside_text(prompts: Prompts) -> None:
    """With guidance, embeddings are as many, and as long, as the texts of the other branch will be."""
    num_prompts, length = max(len(prompts), 1), prompts.max_sequence_length
    for (name, _, embeds), (other, _, other_embeds) in itertools.permutations(_branches(prompts)):
        if embeds is None or other_embeds is not None:
            continue
        valid = f"({num_prompts}, {length}, dim) beside `{other}`, padded to `max_sequence_length`: or pass `{other}_embeds`"
        check(embeds.shape[:2] == (num_prompts, length), f"{name}_embeds", embeds, valid)


def first_prompt(schedule: Any, prompt: Any, prompt_embeds: Any) -> dict:
    """The argument that chunk 0 of a schedule stands for, `prompt` or `prompt_embeds`; empty without chunk 0."""
    first = schedule.get(0) if isinstance(schedule, dict) else None
    if isinstance(schedule, (list, tuple)) and all(each is None or isinstance(each, dict) for each in schedule):
        first = [each[0] for each in schedule if each and 0 in each] or None
    if first is None:
        return {}
    for name, given in (("prompt", prompt), ("prompt_embeds", prompt_embeds)):
        check(given is None, name, given, "None where `prompt_schedule` has chunk 0")
    return {"prompt_embeds" if isinstance(first, torch.Tensor) else "prompt": first}


def _check_chunks(name: str, by_chunk: Any, may_be_empty: bool = False) -> None:
    valid = (
        f"a dict of chunk indices >= 0, ascending, {'or None' if may_be_empty else 'or None instead of an empty one'}"
    )
    check(isinstance(by_chunk, dict) and (may_be_empty or len(by_chunk) > 0), name, by_chunk, valid, TypeError)
    whole = all(isinstance(chunk, int) and not isinstance(chunk, bool) for chunk in by_chunk)
    check(whole, name, list(by_chunk), valid, TypeError)
    chunks: Sequence[int] = list(by_chunk)
    check(chunks == sorted(chunks) and min(chunks, default=0) >= 0, name, chunks, valid)
