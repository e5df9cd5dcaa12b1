# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""FlowMo (arXiv 2506.01144): before a denoising step, gradient steps to latents whose predicted video moves evenly.

Equation numbers are those of its section 3. The paper states the objective on the transformer's output; this is its
code's: on the x0 prediction.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin

from ..tokentrim_checks import check, check_choice, check_int, check_list, check_number
from .hook import DenoisingHook


FLOWMO_CHUNKS = ("first", "all")


def motion_variance(x0: torch.Tensor) -> torch.Tensor:
    """FlowMo's objective L: how unevenly the most uneven patch of each video moves (eq. 2, 3, 7, 8).

    T latent frames make T - 1 motions, and at least two are needed for a variance: a chunk of 3 frames gives
    (|x_3 - x_2| - |x_2 - x_1|)^2 / 4. The objective is 0 if every value changes by the same amount from frame to frame, in
    either direction.

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
            The differentiable x0 prediction of such latents, guidance included. The videos of a batch must not depend
            on each other. What it reads must not change until `guide` returns: gradient checkpointing runs it again.
        iterations (`int`): gradient steps; 1 in the paper.
        learning_rate (`float`): eta; 0.005 in the paper.

    Returns:
        `torch.Tensor`: like `latents`, without a graph; `latents` themselves for 0 iterations.

    Raises:
        `RuntimeError`: the gradient is not finite, or gradients are off because of `torch.inference_mode`.
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


class FlowMo(DenoisingHook):
    """Guides latents before some of their denoising steps.

    Args:
        iterations (`int`, defaults to `1`): gradient steps before a denoising step; 0 is off.
        learning_rate (`float`, defaults to `0.005`): size of a gradient step.
        steps (`list[int]`, *optional*):
            Indices of the denoising steps that it guides. By default the first quarter of them, rounded up (12 of 50 in
            its paper).
        chunks (`str`, defaults to `"first"`):
            `"first"`, the first generated chunk, TokenTrim's motion-stabilised initialisation; or `"all"`.
    """

    def __init__(
        self,
        iterations: int = 1,
        learning_rate: float = 0.005,
        steps: list[int] | None = None,
        chunks: str = "first",
    ):
        check_int("iterations", iterations, 0)
        check_number("learning_rate", learning_rate, lambda rate: rate > 0, "a finite number > 0")
        check_choice("chunks", chunks, FLOWMO_CHUNKS)
        if steps is not None:
            check_list("steps", steps, int, "a list of ints")
            check(min(steps, default=0) >= 0, "steps", steps, "a list of ints >= 0, or None")
        self.iterations = iterations
        self.learning_rate = learning_rate
        self.steps = steps
        self.chunks = chunks

    def check(self, generated: Sequence[int], drift_signal: str) -> None:
        """Refuse chunks that are too short, and a drift signal whose flow would be of other latents."""
        guided = generated[:1] if self.chunks == "first" else generated
        valid = "0 for chunks of less than 3 latent frames, whose motion has no variance"
        check(self.iterations == 0 or min(guided) >= 3, "flowmo: iterations", self.iterations, valid)
        valid = "'first' for drift_signal='first_step', whose flow would be of the latents before guidance"
        fits = self.iterations == 0 or self.chunks == "first" or drift_signal == "final"
        check(fits, "flowmo: chunks", self.chunks, valid)

    def guides(self, generated_chunk: int, step: int, num_steps: int) -> bool:
        steps = range(-(-num_steps // 4)) if self.steps is None else self.steps
        return self.iterations > 0 and step in steps and (self.chunks == "all" or generated_chunk == 0)

    def __call__(self, latents: torch.Tensor, predict_x0: Callable, transformer: ModelMixin) -> torch.Tensor:
        """The guided latents, see [`guide`]."""
        with checkpointed(transformer):
            return guide(latents, predict_x0, self.iterations, self.learning_rate)
