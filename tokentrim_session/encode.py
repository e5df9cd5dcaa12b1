# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a run needs encoded before it starts: prompts, and the frames to continue."""

from typing import Any

import torch

from .denoise import Prompt


def encode_prompts(pipe: Any, plan: Any, device: torch.device) -> Prompt:
    """Embeddings of a call's prompts, one row for each video; negative ones with classifier-free guidance."""
    call, repeats, guided = plan.call, plan.call["num_videos_per_prompt"], plan.call["guidance_scale"] > 1
    names = ("prompt_embeds", "negative_prompt_embeds")
    encoded = pipe.encode_prompt(
        prompt=call["prompt"],
        negative_prompt=call["negative_prompt"],
        do_classifier_free_guidance=guided,
        num_videos_per_prompt=repeats,
        prompt_embeds=call["prompt_embeds"],
        negative_prompt_embeds=call["negative_prompt_embeds"],
        max_sequence_length=plan.max_sequence_length,
        device=device,
    )
    embeds, negative_embeds = (
        each if each is None or call[name] is None else each.repeat_interleave(repeats, dim=0)
        for name, each in zip(names, encoded)
    )
    return Prompt(embeds, negative_embeds if guided else None)


def encode_change(pipe: Any, plan: Any, change: Any, device: torch.device) -> list[torch.Tensor | None]:
    """Embeddings (text, dim) of a change for each video, `None` where the prompt stays."""
    texts = [prompt for prompt in change.prompts if isinstance(prompt, str)]
    settings = {"do_classifier_free_guidance": False, "max_sequence_length": plan.max_sequence_length}
    encoded = iter(pipe.encode_prompt(texts, device=device, **settings)[0] if texts else ())
    rows = [next(encoded) if isinstance(prompt, str) else prompt for prompt in change.prompts]
    return [row for row in rows for _ in range(plan.call["num_videos_per_prompt"])]


def encode_given(pipe: Any, plan: Any, device: torch.device) -> torch.Tensor | None:
    """Latents of the frames to continue, (B, C, T, H, W)."""
    video, latents = plan.call["video"], plan.call["video_latents"]
    if video is not None:
        latents = encode_video(pipe, video, plan.height, plan.width)
    if latents is None:
        return None
    latents = latents.to(device, torch.float32).transpose(1, 2)
    return latents.repeat_interleave(plan.num_videos // len(latents), dim=0)


def encode_video(pipe: Any, video: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`pipe.encode_video` for any length: the VAE goes by 1 + 4n frames and drops a rest, so a rest is padded for it."""
    num_latent_frames = (video.shape[1] - 1) // pipe.vae_scale_factor_temporal + 1
    padding = video[:, -1:].expand(-1, (1 - video.shape[1]) % 4, -1, -1, -1)  # never seen by the frames before
    return pipe.encode_video(torch.cat([video, padding], dim=1), height, width)[:, :num_latent_frames]
