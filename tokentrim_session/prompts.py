# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The prompts of a call, and over time: which one serves from which chunk on, and what becomes of the context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..tokentrim_checks import check, check_choice, check_int, check_tensor


TRANSITIONS = ("keep", "recache", "flush", "cut")


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
        prompt (`str`, `list` or `torch.Tensor`): one for all, one for each (`None`: stays), or embeddings (B, text, dim).
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
    if transition != "keep":
        valid = "'keep' where only some videos of a batch change: the others' context would change with them"
        check(all(each is not None for each in prompts), "prompt_transition", transition, valid)
    return PromptChange(prompts, transition, blend_chunks)


def read_schedule(schedule: Any, transition: Any, blend_chunks: int, num_prompts: int) -> dict[int, PromptChange]:
    """
    The changes of a prompt schedule, by chunk.

    Args:
        schedule (`dict` or `list[dict]`):
            `{chunk: prompt}` in ascending order, prompts as in [`make_change`]; or one such dict for each prompt.
        transition (`str` or `dict`): one of `TRANSITIONS`, or `{chunk: transition}` for some of the chunks.
        blend_chunks (`int`): see [`PromptChange`].
        num_prompts (`int`): prompts of the call.
    """
    if isinstance(schedule, (list, tuple)):
        check(
            len(schedule) == num_prompts, "prompt_schedule", len(schedule), f"{num_prompts} dicts, one for each prompt"
        )
        for each in schedule:
            _check_chunks("prompt_schedule", each)
        chunks = sorted({chunk for each in schedule for chunk in each})
        schedule = {chunk: [each.get(chunk) for each in schedule] for chunk in chunks}
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


def check_change(change: PromptChange, layout: Any, far: bool) -> None:
    """Refuse a transition that the layout or the backbone cannot make."""
    served = getattr(layout, "transitions", ("keep",))
    check(
        change.transition in served,
        "prompt_transition",
        change.transition,
        f"one of {served} for {type(layout).__name__}",
    )
    valid = "'keep' for AnyFlow-FAR, whose context is encoded in two resolutions"
    check(not far or change.transition == "keep", "prompt_transition", change.transition, valid)


def blended(old: torch.Tensor, new: torch.Tensor, blend_chunks: int) -> list[torch.Tensor]:
    """Embeddings of the chunks from a change on: on a straight line from the old ones, the new ones last."""
    return [torch.lerp(old, new, (step + 1) / (blend_chunks + 1)) for step in range(blend_chunks)] + [new]


def check_prompts(pipe: Any, call: dict) -> int:
    """How many prompts there are. Texts are texts, embeddings (B, text, text_dim), alike in both guidance branches."""
    prompt, embeds = call["prompt"], call["prompt_embeds"]
    for name in ("prompt", "negative_prompt"):
        texts, alone = call[name], call[f"{name}_embeds"] is None
        check(alone or texts is None, f"{name}_embeds", call[f"{name}_embeds"], f"None where `{name}` is given")
        check(texts is None or isinstance(texts, (str, list)), name, texts, "a str or a list of str", TypeError)
    check(prompt is not None or embeds is not None, "prompt", prompt, "given, or `prompt_embeds`")
    text_dim = pipe.transformer.config.text_dim
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if call[name] is not None:
            check_tensor(name, call[name], 3, "(batch, text, dim)")
            fits = len(call[name]) > 0 and call[name].shape[-1] == text_dim
            check(fits, name, call[name], f"(batch, text, {text_dim})")
    if embeds is not None and call["negative_prompt_embeds"] is not None:
        alike = embeds.shape == call["negative_prompt_embeds"].shape
        valid = f"shaped like `prompt_embeds`, {tuple(embeds.shape)}"
        check(alike, "negative_prompt_embeds", call["negative_prompt_embeds"], valid)
    batch_size = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else embeds)
    if call["guidance_scale"] > 1:
        _check_beside_text(call, max(batch_size, 1))
    for name in ("prompt", "negative_prompt"):
        if isinstance(texts := call[name], list):
            check(all(isinstance(text, str) for text in texts), name, texts, "a str or a list of str", TypeError)
            check(len(texts) == max(batch_size, 1), name, texts, f"a str or a list of {max(batch_size, 1)}")
    return batch_size


def _check_beside_text(call: dict, batch_size: int) -> None:
    """With guidance, embeddings are as many, and as long, as the texts beside them will be."""
    for name, other in (("prompt_embeds", "negative_prompt"), ("negative_prompt_embeds", "prompt")):
        if call[name] is None or call[f"{other}_embeds"] is not None:
            continue
        length = call["max_sequence_length"]
        valid = f"({batch_size}, {length}, dim) beside `{other}`, padded to `max_sequence_length`: or pass `{other}_embeds`"
        check(call[name].shape[:2] == (batch_size, length), name, call[name], valid)


def take_first_prompt(call: dict) -> None:
    """The prompt of chunk 0, where the schedule says it."""
    schedule = call["prompt_schedule"]
    if schedule is None:
        return
    first = schedule.get(0) if isinstance(schedule, dict) else None
    if isinstance(schedule, (list, tuple)) and all(isinstance(each, dict) for each in schedule):
        first = [each[0] for each in schedule if 0 in each] or None
    for name in ("prompt", "prompt_embeds"):
        check(first is None or call[name] is None, name, call[name], "None where `prompt_schedule` has chunk 0")
    if first is not None:
        call["prompt_embeds" if isinstance(first, torch.Tensor) else "prompt"] = first


def plan_prompts(
    call: dict, layout: Any, num_videos: int, num_chunks: int | None, far: bool
) -> dict[int, PromptChange]:
    """The changes of the prompt schedule, without chunk 0."""
    if call["prompt_schedule"] is None:
        return {}
    num_prompts = num_videos // call["num_videos_per_prompt"]
    changes = read_schedule(call["prompt_schedule"], call["prompt_transition"], call["blend_chunks"], num_prompts)
    changes.pop(0, None)
    for chunk, change in changes.items():
        check_change(change, layout, far)
        inside = num_chunks is None or chunk < num_chunks
        check(inside, "prompt_schedule", chunk, f"a dict of chunks below {num_chunks}, the chunks of the video")
    return changes


def _check_chunks(name: str, by_chunk: Any) -> None:
    valid = "a dict of chunk indices >= 0, ascending"
    check(isinstance(by_chunk, dict) and len(by_chunk) > 0, name, by_chunk, valid, TypeError)
    whole = all(isinstance(chunk, int) and not isinstance(chunk, bool) for chunk in by_chunk)
    check(whole, name, list(by_chunk), valid, TypeError)
    chunks: Sequence[int] = list(by_chunk)
    check(chunks == sorted(chunks) and chunks[0] >= 0, name, chunks, valid)
