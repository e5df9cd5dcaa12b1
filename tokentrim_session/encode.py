# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Encodes what a run needs before it starts: prompts, and the frames to continue."""

import torch

from ..tokentrim_checks import check
from .host import Pipeline
from .plan import RolloutPlan, Sizes
from .prompts import EncodedPrompt, PromptChange


def encode_prompts(pipe: Pipeline, plan: RolloutPlan, device: torch.device) -> EncodedPrompt:
    """Embeddings of a call's prompts, one row for each video; negative ones with classifier-free guidance."""
    prompts, repeats, guided = plan.inputs.prompts, plan.sizes.num_videos_per_prompt, plan.schedule.is_guided
    given = (prompts.prompt_embeds, prompts.negative_prompt_embeds)
    encoded = pipe.encode_prompt(
        prompt=prompts.prompt,
        negative_prompt=prompts.negative_prompt,
        do_classifier_free_guidance=guided,
        num_videos_per_prompt=repeats,
        prompt_embeds=prompts.prompt_embeds,
        negative_prompt_embeds=prompts.negative_prompt_embeds,
        max_sequence_length=prompts.max_sequence_length,
        device=device,
    )
    embeds, negative_embeds = (  # Diffusers repeats only what it encodes
        each if each is None or as_given is None else each.repeat_interleave(repeats, dim=0)
        for as_given, each in zip(given, encoded)
    )
    return EncodedPrompt(embeds, negative_embeds if guided else None)


def encode_change(
    pipe: Pipeline, plan: RolloutPlan, change: PromptChange, device: torch.device
) -> list[torch.Tensor | None]:
    """Embeddings (text, dim) of a change for each video, `None` where the prompt stays."""
    texts = [prompt for prompt in change.prompts if isinstance(prompt, str)]
    for name in ("tokenizer", "text_encoder") if texts else ():
        check(getattr(pipe, name) is not None, name, None, "a component, unless prompts are embeddings")
    settings = {"do_classifier_free_guidance": False, "max_sequence_length": plan.inputs.prompts.max_sequence_length}
    encoded = iter(pipe.encode_prompt(texts, device=device, **settings)[0] if texts else ())
    rows = [next(encoded) if isinstance(prompt, str) else prompt for prompt in change.prompts]
    return [row for row in rows for _ in range(plan.sizes.num_videos_per_prompt)]


def encode_given(pipe: Pipeline, plan: RolloutPlan, device: torch.device) -> torch.Tensor | None:
    """Latents of the frames to continue, (B, C, T, H, W)."""
    latents = plan.inputs.video_latents
    if plan.inputs.video is not None:
        latents = encode_video(pipe, plan.inputs.video, plan.sizes)
    if latents is None:
        return None
    latents = latents.to(device, torch.float32).transpose(1, 2)
    return latents.repeat_interleave(plan.sizes.num_videos // len(latents), dim=0)


def encode_video(pipe: Pipeline, video: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """`pipe.encode_video` for any length: the VAE takes 1 + 4n frames and drops a rest, so that a rest is padded."""
    num_latent_frames = (video.shape[1] - 1) // sizes.temporal_factor + 1
    padding = video[:, -1:].expand(-1, (1 - video.shape[1]) % 4, -1, -1, -1)  # the frames before never see it
    padded = torch.cat([video, padding], dim=1)
    return pipe.encode_video(padded, sizes.height, sizes.width)[:, :num_latent_frames]
