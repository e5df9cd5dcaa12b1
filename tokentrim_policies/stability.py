# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How far a chunk moved away from the one before it: TokenTrim (arXiv 2602.00268), section 4, equations 4 to 6.

Pure functions of latents. A *token* is one patch of the transformer's grid, the granularity of its KV cache.
"""

import math

import torch


def token_grid(size: tuple[int, int], patch_size: tuple[int, int, int]) -> tuple[int, int]:
    """The grid of tokens (height, width) that a latent frame of `size`, (H, W), makes."""
    return size[0] // patch_size[1], size[1] // patch_size[2]


def summarize(latents: torch.Tensor, patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Latent summary Z_t: the mean over a chunk's frames of its tokens (eq. 4).

    Args:
        latents (`torch.Tensor`): denoised latents of one chunk, (B, C, T, H, W).
        patch_size (`tuple[int, int, int]`): the transformer's (frames, height, width) patch.

    Returns:
        `torch.Tensor`: (B, N, D) in fp32 with N = H / p_h * W / p_w tokens in row-major order and D = C * p_h * p_w.
    """
    _, p_h, p_w = patch_size
    mean_frame = latents.float().mean(dim=2)  # (B, C, H, W)
    return torch.nn.functional.unfold(mean_frame, (p_h, p_w), stride=(p_h, p_w)).transpose(1, 2)


def token_drift(summary: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per-token drift d_i = ||Z_t(i) - Z_{t-1}(i)||_2 (eq. 5): (B, N, D), (B, N, D) -> (B, N)."""
    return torch.linalg.vector_norm(summary - reference, dim=-1)


def unstable_tokens(drift: torch.Tensor, prune_fraction: float) -> torch.Tensor:
    """Unstable set S_t: the ceil(p N) tokens of largest drift, ascending by index: (B, N) -> (B, ceil(p N))."""
    # p N is a product of a decimal and an integer: take away the rounding before the ceiling (0.07 * 100 > 7).
    num_unstable = max(math.ceil(round(prune_fraction * drift.shape[-1], 6)), 1)
    return drift.topk(num_unstable, dim=-1).indices.sort(dim=-1).values


def severity(drift: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Severity D_t: the mean drift over the unstable set (eq. 6): (B, N), (B, M) -> (B,)."""
    return drift.gather(-1, tokens).mean(dim=-1)
