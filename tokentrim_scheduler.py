# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Diffusers schedulers that can go back to the start of a chunk and say what they think the clean chunk is.

A leaf: it imports nothing of this project, so that it also loads alone, as the `scheduler` component of a checkpoint.
"""

import copy
import inspect
import logging
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils import BaseOutput


logger = logging.getLogger("tokentrim.scheduler")

# What the mixin keeps beside the solver's own state.
OURS = ("_internal_dict", "_fresh_state", "_chunk_generators", "_chunk_draws", "_step_generator", "_context_version")

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class TokenTrimSchedulerOutput(BaseOutput):
    """
    Output of a step.

    Args:
        prev_sample (`torch.Tensor`): the sample at the next noise level, the next model input.
        pred_original_sample (`torch.Tensor`): the x0 prediction of this step, x_t - sigma * flow.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class TokenTrimSchedulerMixin:
    r"""
    Makes any flow-matching scheduler of Diffusers fit for chunks that may be generated twice. Put it before the
    scheduler in the bases, or lift an instance with [`lift_scheduler`].

    After `set_timesteps`, call `begin_chunk` at each chunk, then `step` for each timestep. `rewind` goes back to the
    chunk's start: the solver forgets its history and its generators repeat the same draws. All steps of one
    trajectory must name the same `context_version`, so that one ODE never mixes two contexts.
    """

    rollout_version = 2  # of what a rollout asks of a scheduler; `lift_scheduler` lifts those of an older one again
    renoises = False  # whether a step ends with (1 - sigma) x0 + sigma eps, and `step` takes that eps as `noise`

    @property
    def draws_inside(self) -> bool:
        """Whether the scheduler's own `step` may draw random numbers, from the chunk's generator."""
        return not self.renoises and "generator" in inspect.signature(super().step).parameters

    def set_timesteps(self, *args, **kwargs) -> None:
        """As the scheduler's own; remembers the solver's state before its first step."""
        super().set_timesteps(*args, **kwargs)
        self._start_here()

    def set_rollout_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """
        The schedule of every chunk: `set_timesteps` with linspace(1, 0, S + 1)[:-1] as the default sigmas, before the
        shift. A scheduler that takes no sigmas keeps its own spacing.

        Args:
            num_inference_steps (`int`): S, ignored where `sigmas` or `timesteps` are given.
            device (`str` or `torch.device`, *optional*): where the schedule lies.
            sigmas (`list[float]`, *optional*): custom noise levels, before the shift.
            timesteps (`list[float]`, *optional*):
                Custom timesteps, as `self.timesteps` has them: each stands at sigma = t / `num_train_timesteps`, and is
                not shifted again, whatever the scheduler's own `set_timesteps` makes of them.

        Raises:
            `ValueError`: the scheduler takes no custom sigmas or timesteps.
        """
        for name, custom in (("sigmas", sigmas), ("timesteps", timesteps)):
            if custom is not None and not self.takes(name):
                raise ValueError(f"`{name}` must be None for {type(self).__name__}, but is {custom!r}.")
        if timesteps is not None:
            self.set_rollout_timesteps(len(timesteps), device)
            if self.timesteps.tolist() != list(timesteps):  # else to the same bits
                levels = [timestep / self.config.num_train_timesteps for timestep in timesteps]
                self.timesteps, self.sigmas = (
                    self.timesteps.new_tensor(timesteps),
                    self.sigmas.new_tensor([*levels, 0]),
                )
                self._start_here()
        elif self.takes("sigmas"):
            sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1] if sigmas is None else np.asarray(sigmas)
            self.set_timesteps(len(sigmas), device=device, sigmas=sigmas)
        else:
            self.set_timesteps(num_inference_steps, device=device)

    def takes(self, name: str) -> bool:
        """Whether it takes custom `"sigmas"` (as its own `set_timesteps` does) or `"timesteps"` (where no step needs
        those before it)."""
        return self.single_step if name == "timesteps" else name in inspect.signature(super().set_timesteps).parameters

    def begin_chunk(self, generator: Generators = None) -> None:
        """
        Start the trajectory of a new chunk with a fresh solver.

        Args:
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the draws that the scheduler's own `step` makes in this chunk, if it makes any.
        """
        self._chunk_generators = generator if isinstance(generator, list) else [generator] if generator else []
        self._chunk_draws = [each.get_state() for each in self._chunk_generators]
        self._step_generator = generator
        self._restore()

    def rewind(self, videos: list[int] | None = None) -> None:
        """
        Go back to the start of the chunk: a fresh solver, the same draws, any context.

        Args:
            videos (`list[int]`, *optional*):
                Go on with these samples of the batch alone, so that only their generators (a list) are set back.
        """
        if videos is None or not isinstance(self._step_generator, list):
            videos = range(len(self._chunk_generators))
        else:
            self._step_generator = [self._chunk_generators[video] for video in videos]
        for video in videos:
            self._chunk_generators[video].set_state(self._chunk_draws[video])
        self._restore()

    @property
    def single_step(self) -> bool:
        """Whether a step needs nothing of the steps before it, so that steps of several chunks may take turns."""
        return isinstance(
            self, (FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)
        )

    def seek(self, step: int) -> None:
        """Stand before step `step` of the schedule, with a fresh solver that is bound to no context yet."""
        self._restore()
        self.set_begin_index(step)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        context_version: int | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> TokenTrimSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One step of the wrapped scheduler.

        Args:
            model_output (`torch.Tensor`): flow prediction (noise minus clean) of the model, any shape.
            timestep (`float` or `torch.Tensor`): the current one of `self.timesteps`.
            sample (`torch.Tensor`): x_t, shaped like `model_output`.
            noise (`torch.Tensor`, *optional*):
                eps of the re-noising rule, for schedulers that re-noise (`renoises`); by default they draw it from
                the chunk's generator.
            context_version (`int`, *optional*): what the model attended to; must not change within a trajectory.
            return_dict (`bool`, defaults to `True`): whether to return an output object instead of a tuple.

        Returns:
            [`TokenTrimSchedulerOutput`] or `tuple`: `(prev_sample, pred_original_sample)`.

        Raises:
            `RuntimeError`: no `set_timesteps` before, or another context than at the trajectory's first step.
            `ValueError`: `noise` for a scheduler that does not re-noise.
        """
        if not hasattr(self, "_fresh_state"):
            raise RuntimeError("`set_timesteps` must be called before `step`.")
        if self.step_index is None:
            self._context_version = context_version
        elif context_version != self._context_version:
            raise RuntimeError(
                f"This trajectory began on context version {self._context_version} and would go on with version"
                f" {context_version}: call `rewind()` or `begin_chunk()` after the context changes."
            )
        if noise is not None and not self.renoises:
            raise ValueError(f"`noise` must be None for {type(self).__name__}, which does not re-noise.")

        _, next_sigma = self._sigmas_of_step()
        x0 = self.predict_original_sample(model_output, sample)
        is_last = self._known_sigmas[self._place() + 1] == 0
        if self.renoises and (noise is not None or is_last):
            if self.step_index is None:
                self._init_step_index(timestep)
            self._step_index += 1
            prev_sample = x0 if is_last else (1 - next_sigma) * x0 + next_sigma * noise
        else:
            if "generator" in inspect.signature(super().step).parameters:
                kwargs.setdefault("generator", self._step_generator)
            prev_sample = super().step(model_output, timestep, sample, return_dict=False, **kwargs)[0]
        if not return_dict:
            return (prev_sample, x0)
        return TokenTrimSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def predict_original_sample(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The x0 prediction of the step at hand, x_t - sigma * flow in float64 (as Self Forcing computes it)."""
        sigma, _ = self._sigmas_of_step()
        exact = torch.float32 if sample.device.type == "mps" else torch.float64  # which MPS does not have
        return (sample.to(exact) - sigma.to(exact) * model_output.to(exact)).to(sample.dtype)

    def _start_here(self) -> None:
        """A fresh solver is as this one is."""
        self._known_sigmas = self.sigmas.tolist()  # so that no step asks the device
        self._fresh_state = {name: copy.copy(value) for name, value in vars(self).items() if name not in OURS}
        self.begin_chunk()

    def _sigmas_of_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        index = self._place()
        return self.sigmas[index], self.sigmas[index + 1]

    def _place(self) -> int:
        return self.begin_index if self.step_index is None else self.step_index

    def _restore(self) -> None:
        for name, value in self._fresh_state.items():
            setattr(self, name, copy.copy(value))
        self.set_begin_index(0)  # by index, never by value: some schedulers round their timesteps


class TokenTrimFlowMapEulerDiscreteScheduler(TokenTrimSchedulerMixin, FlowMapEulerDiscreteScheduler):
    """[`FlowMapEulerDiscreteScheduler`] for chunks that may be generated twice."""


class TokenTrimFlowMatchEulerDiscreteScheduler(TokenTrimSchedulerMixin, FlowMatchEulerDiscreteScheduler):
    """[`FlowMatchEulerDiscreteScheduler`] for chunks that may be generated twice."""

    @property
    def renoises(self) -> bool:
        return self.config.stochastic_sampling


class TokenTrimFlowMatchLCMScheduler(TokenTrimSchedulerMixin, FlowMatchLCMScheduler):
    """[`FlowMatchLCMScheduler`] for chunks that may be generated twice: the rule of Self Forcing."""

    renoises = True


class TokenTrimUniPCMultistepScheduler(TokenTrimSchedulerMixin, UniPCMultistepScheduler):
    """[`UniPCMultistepScheduler`] for chunks that may be generated twice."""


def lift_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Give any Diffusers scheduler [`TokenTrimSchedulerMixin`], from its config; one that has it comes back as it is.

    The mixin is known by its version, not by its class: a file loaded as a component is another class object.
    """
    if getattr(scheduler, "rollout_version", 0) >= TokenTrimSchedulerMixin.rollout_version:
        return scheduler
    stock = next(base for base in type(scheduler).__mro__ if not hasattr(base, "begin_chunk"))
    lifted = globals().get(f"TokenTrim{stock.__name__}")
    if lifted is None:
        lifted = type(f"TokenTrim{stock.__name__}", (TokenTrimSchedulerMixin, stock), {"__module__": __name__})
    logger.info("scheduler %s: lifted to %s, with its config", stock.__name__, lifted.__name__)
    ours = lifted.from_config(scheduler.config)
    if hasattr(scheduler, "set_shift"):  # what was set is in no config
        ours.set_shift(scheduler.shift)
    return ours
