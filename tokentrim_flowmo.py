# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""FlowMo (arXiv 2506.01144): before a denoising step, gradient steps to latents whose predicted video moves evenly.

Equation numbers are those of its section 3. The paper states the objective on the transformer's output; this is its
code's: on the x0 prediction.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin


def motion_variance(x0: torch.Tensor) -> torch.Tensor:
    """FlowMo's objective L: how unevenly the most uneven patch of each video moves (eq. 2, 3, 7, 8).

    T latent frames make T - 1 motions, of which it takes two to vary: a chunk of 3 frames gives
    (|x_3 - x_2| - |x_2 - x_1|)^2 / 4. A video is at 0 where every value changes by the same amount from frame to
    frame, in whichever direction.

    Args:
        x0 (`torch.Tensor`):
            x0 prediction, (B, C, T, H, W) with T >= 3. A patch, in the paper, is one position of H x W.

    Returns:
        `torch.Tensor`: (B,) in fp32, differentiable.
    """
    if x0.shape[2] < 3:
        raise ValueError(f"The variance of motion needs at least 3 latent frames, but there are {x0.shape[2]}.")
    motion = x0.float().diff(dim=2).abs()  # eq. 2: (B, C, T - 1, H, W)
    variance = motion.var(dim=2, correction=0)  # eq. 3: (B, C, H, W)
    return variance.mean(dim=1).amax(dim=(1, 2))  # eq. 7: (B, H, W); eq. 8


def guide(
    latents: torch.Tensor,
    predict_x0: Callable[[torch.Tensor], torch.Tensor],
    iterations: int,
    learning_rate: float,
) -> torch.Tensor:
    """FlowMo's refinement z_t <- z_t - eta grad L of the latents of one denoising step (eq. 9), by Adam.

    Args:
        latents (`torch.Tensor`): noisy latents, (B, C, T, H, W) with T >= 3.
        predict_x0 (`Callable`):
            The differentiable x0 prediction of such latents, guidance included. No video of it may depend on another.
            Whatever it reads has to stay as it is until `guide` returns: gradient checkpointing runs it again.
        iterations (`int`): gradient steps; 1 in the paper.
        learning_rate (`float`): eta; 0.005 in the paper.

    Returns:
        `torch.Tensor`: like `latents`, without a graph; `latents` themselves for 0 iterations.

    Raises:
        RuntimeError: where the gradient is not finite, or in `torch.inference_mode`, which knows no gradients.
    """
    if iterations == 0:
        return latents
    if torch.is_inference_mode_enabled():
        raise RuntimeError("FlowMo needs gradients: use `torch.no_grad` instead of `torch.inference_mode`.")
    guided = latents.detach().to(torch.float32, copy=True).requires_grad_()  # steps of eta would be lost in bf16
    adam = torch.optim.Adam([guided], lr=learning_rate)  # elementwise: videos stay independent
    for iteration in range(iterations):
        with torch.enable_grad():
            variance = motion_variance(predict_x0(guided.to(latents.dtype)))
            (guided.grad,) = torch.autograd.grad(variance.sum(), guided)
        if not torch.isfinite(guided.grad).all():
            values = [round(value, 6) for value in variance.tolist()]
            raise RuntimeError(
                f"FlowMo's gradient is not finite (NaN or Inf) in iteration {iteration}, motion variance {values}."
            )
        adam.step()
    return guided.detach().to(latents.dtype)


@contextmanager
def checkpointed(transformer: ModelMixin) -> Iterator[None]:
    """Freeze `transformer` and let a backward pass recompute its blocks instead of storing them; always undone."""
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    enable = not transformer.is_gradient_checkpointing
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        if enable:
            transformer.enable_gradient_checkpointing()
        yield
    finally:
        if enable:
            transformer.disable_gradient_checkpointing()
        for parameter in trained:
            parameter.requires_grad_(True)
