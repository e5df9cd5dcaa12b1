# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The contract of a hook of the denoiser: what changes latents while a chunk is denoised."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ModelMixin


class DenoisingHook:
    """Changes the latents of a chunk before some of its denoising steps. By default: before none.

    Hooks run in the order of the method, each on the latents that the one before it returned.
    """

    def check(self, generated: Sequence[int], drift_signal: str) -> None:
        """Refuse a rollout that the hook cannot serve. By default it serves all.

        Args:
            generated (`Sequence[int]`): latent frames of each generated chunk.
            drift_signal (`str`): what policies review, `"final"` or `"first_step"`.

        Raises:
            `ValueError`: a setting does not fit; the message names it, its value and what is valid.
        """

    def guides(self, generated_chunk: int, step: int, num_steps: int) -> bool:
        """Whether the hook acts before a step.

        Args:
            generated_chunk (`int`): index of the chunk, counted from the first generated one.
            step (`int`): index of the denoising step.
            num_steps (`int`): denoising steps of a chunk.
        """
        return False

    def __call__(self, latents: torch.Tensor, predict_x0: Callable, transformer: ModelMixin) -> torch.Tensor:
        """Change the latents before a step.

        Args:
            latents (`torch.Tensor`): noisy latents of the chunk, (B, C, T, H, W).
            predict_x0 (`Callable`): the differentiable x0 prediction of such latents, guidance included.
            transformer (`ModelMixin`): the model that `predict_x0` asks.

        Returns:
            `torch.Tensor`: the latents that the step starts from, of the same shape.
        """
        return latents


class CompletedHook(DenoisingHook):
    """A user's callable with `guides`; without `check`, it serves every rollout.

    Args:
        hook: the object.
    """

    def __init__(self, hook: Any):
        self.hook = hook

    def check(self, generated: Sequence[int], drift_signal: str) -> None:
        check = getattr(self.hook, "check", None)
        if callable(check):
            check(generated, drift_signal)

    def guides(self, generated_chunk: int, step: int, num_steps: int) -> bool:
        return self.hook.guides(generated_chunk, step, num_steps)

    def __call__(self, latents: torch.Tensor, predict_x0: Callable, transformer: ModelMixin) -> torch.Tensor:
        return self.hook(latents, predict_x0, transformer)
