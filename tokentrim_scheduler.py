# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Diffusers schedulers that can return to the start of a chunk. They load alone, as a checkpoint's scheduler."""

import copy
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

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

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class Trajectory:
    """What the mixin keeps beside the solver's own state, from `set_timesteps` on."""

    solver: dict[str, Any]  # attributes of the solver before its first step
    sigmas: list[float]  # the schedule's noise levels on the CPU, so that no step waits for the device
    generators: list[torch.Generator] = field(default_factory=list)  # source of the draws in this chunk
    draws: list[torch.Tensor] = field(default_factory=list)  # state of each generator at the chunk's start
    generator: Generators = None  # those of the samples that the trajectory continues with
    context_version: int | None = None  # what the model attended to at the first step


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
    Lets any flow-matching scheduler of Diffusers generate a chunk more than once. Put it before the scheduler in the
    bases, or lift an instance with [`lift_scheduler`].

    After `set_timesteps`, call `begin_chunk` at each chunk, then `step` for each timestep. `rewind` returns to the
    chunk's start: the solver forgets its history and its generators repeat the same draws. All steps of one
    trajectory must name the same `context_version`, so that one ODE never mixes two contexts.

    Attributes:
        rollout_version (`int`): version of this interface; `lift_scheduler` lifts schedulers of an older one again.
        renoises (`bool`): whether a step ends with (1 - sigma) x0 + sigma eps, and `step` takes that eps as `noise`.
        single_step (`bool`): whether a step needs no step before it, so that steps of several chunks may take turns.
    """

    rollout_version = 2
    renoises = False
    single_step = False

    @property
    def draws_inside(self) -> bool:
        """Whether the scheduler's own `step` may draw random numbers, from the chunk's generator."""
        return not self.renoises and "generator" in inspect.signature(super().step).parameters

    def set_timesteps(self, *args, **kwargs) -> None:
        """The scheduler's own `set_timesteps`, after which chunks begin with the solver as it is then."""
        super().set_timesteps(*args, **kwargs)
        self._remember_solver()

    def set_rollout_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """
        Set the schedule of every chunk: `set_timesteps` with linspace(1, 0, S + 1)[:-1] as the default sigmas, before
        the shift. A scheduler that takes no sigmas keeps its own spacing.

        Args:
            num_inference_steps (`int`): S, ignored where `sigmas` or `timesteps` are given.
            device (`str` or `torch.device`, *optional*): device of the schedule.
            sigmas (`list[float]`, *optional*): custom noise levels, before the shift.
            timesteps (`list[float]`, *optional*):
                Custom timesteps, as in `self.timesteps`: each stands for sigma = t / `num_train_timesteps`, and is not
                shifted, whatever the scheduler's own `set_timesteps` does with timesteps.

        Raises:
            `ValueError`: the scheduler takes no custom sigmas or timesteps.
        """
        for name, custom in (("sigmas", sigmas), ("timesteps", timesteps)):
            if custom is not None and not self.takes(name):
                raise ValueError(f"`{name}` must be None for {type(self).__name__}, but is {custom!r}.")
        if timesteps is not None:
            self.set_rollout_timesteps(len(timesteps), device)
            if self.timesteps.tolist() != list(timesteps):  # the default ones keep their exact sigmas
                levels = [timestep / self.config.num_train_timesteps for timestep in timesteps]
                self.timesteps = self.timesteps.new_tensor(timesteps)
                self.sigmas = self.sigmas.new_tensor([*levels, 0])
                self._remember_solver()
        elif self.takes("sigmas"):
            sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1] if sigmas is None else np.asarray(sigmas)
            self.set_timesteps(len(sigmas), device=device, sigmas=sigmas)
        else:
            self.set_timesteps(num_inference_steps, device=device)

    def takes(self, name: str) -> bool:
        """Whether the scheduler takes custom `"sigmas"` (its own `set_timesteps` must) or `"timesteps"` (a step must
        not need the steps before it)."""
        return self.single_step if name == "timesteps" else name in inspect.signature(super().set_timesteps).parameters

    def begin_chunk(self, generator: Generators = None) -> None:
        """
        Start the trajectory of a new chunk with a fresh solver.

        Args:
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the draws that the scheduler's own `step` makes in this chunk, if it makes any.
        """
        generators = generator if isinstance(generator, list) else [generator] if generator else []
        self._trajectory.generators, self._trajectory.generator = generators, generator
        self._trajectory.draws = [each.get_state() for each in generators]
        self._restore_solver()

    def rewind(self, videos: list[int] | None = None) -> None:
        """
        Return to the start of the chunk: a fresh solver, the same draws, any context.

        Args:
            videos (`list[int]`, *optional*):
                Continue with these samples of the batch alone, so that only their generators (a list) are set back.
        """
        trajectory = self._trajectory
        if videos is None or not isinstance(trajectory.generator, list):
            videos = range(len(trajectory.generators))
        else:
            trajectory.generator = [trajectory.generators[video] for video in videos]
        for video in videos:
            trajectory.generators[video].set_state(trajectory.draws[video])
        self._restore_solver()

    def seek(self, step: int) -> None:
        """Continue at step `step` of the schedule, with a fresh solver that is bound to no context yet."""
        self._restore_solver()
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
            `RuntimeError`: `set_timesteps` was not called, or the context is not that of the trajectory's first step.
            `ValueError`: `noise` for a scheduler that does not re-noise.
        """
        if not hasattr(self, "_trajectory"):
            raise RuntimeError("`set_timesteps` must be called before `step`.")
        if self.step_index is None:
            self._trajectory.context_version = context_version
        elif context_version != self._trajectory.context_version:
            raise RuntimeError(
                f"This trajectory began on context version {self._trajectory.context_version} and would continue on"
                f" version {context_version}: call `rewind()` or `begin_chunk()` after the context changes."
            )
        if noise is not None and not self.renoises:
            raise ValueError(f"`noise` must be None for {type(self).__name__}, which does not re-noise.")

        _, next_sigma = self._sigmas_of_step()
        x0 = self.predict_original_sample(model_output, sample)
        is_last = self._trajectory.sigmas[self._place() + 1] == 0
        if self.renoises and (noise is not None or is_last):
            if self.step_index is None:
                self._init_step_index(timestep)
            self._step_index += 1
            prev_sample = x0 if is_last else (1 - next_sigma) * x0 + next_sigma * noise
        else:
            if "generator" in inspect.signature(super().step).parameters:
                kwargs.setdefault("generator", self._trajectory.generator)
            prev_sample = super().step(model_output, timestep, sample, return_dict=False, **kwargs)[0]
        if not return_dict:
            return (prev_sample, x0)
        return TokenTrimSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def predict_original_sample(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The x0 prediction of the next step, x_t - sigma * flow in float64 (as Self Forcing computes it)."""
        sigma, _ = self._sigmas_of_step()
        exact = torch.float32 if sample.device.type == "mps" else torch.float64  # which MPS does not have
        return (sample.to(exact) - sigma.to(exact) * model_output.to(exact)).to(sample.dtype)

    def _remember_solver(self) -> None:
        """From here on, a fresh solver is what this one is now."""
        not_solver = ("_internal_dict", "_trajectory")  # Diffusers' config, and what is made here
        solver = {name: copy.copy(value) for name, value in vars(self).items() if name not in not_solver}
        self._trajectory = Trajectory(solver, self.sigmas.tolist())
        self.begin_chunk()

    def _sigmas_of_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        index = self._place()
        return self.sigmas[index], self.sigmas[index + 1]

    def _place(self) -> int:
        return self.begin_index if self.step_index is None else self.step_index

    def _restore_solver(self) -> None:
        for name, value in self._trajectory.solver.items():
            setattr(self, name, copy.copy(value))
        self.set_begin_index(0)  # by index, never by value: some schedulers round their timesteps


class TokenTrimFlowMapEulerDiscreteScheduler(TokenTrimSchedulerMixin, FlowMapEulerDiscreteScheduler):
    """[`FlowMapEulerDiscreteScheduler`] for chunks that may be generated twice."""

    single_step = True


class TokenTrimFlowMatchEulerDiscreteScheduler(TokenTrimSchedulerMixin, FlowMatchEulerDiscreteScheduler):
    """[`FlowMatchEulerDiscreteScheduler`] for chunks that may be generated twice."""

    single_step = True

    @property
    def renoises(self) -> bool:
        return self.config.stochastic_sampling


class TokenTrimFlowMatchLCMScheduler(TokenTrimSchedulerMixin, FlowMatchLCMScheduler):
    """[`FlowMatchLCMScheduler`] for chunks that may be generated twice: the rule of Self Forcing."""

    renoises = True
    single_step = True


class TokenTrimUniPCMultistepScheduler(TokenTrimSchedulerMixin, UniPCMultistepScheduler):
    """[`UniPCMultistepScheduler`] for chunks that may be generated twice."""


LIFTED = {
    FlowMapEulerDiscreteScheduler: TokenTrimFlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler: TokenTrimFlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler: TokenTrimFlowMatchLCMScheduler,
    UniPCMultistepScheduler: TokenTrimUniPCMultistepScheduler,
}


def lift_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Give any Diffusers scheduler [`TokenTrimSchedulerMixin`], from its config; one that has it is returned as it is.

    The mixin is known by its version, not by its class: a file loaded as a component is another class object.
    """
    if getattr(scheduler, "rollout_version", 0) >= TokenTrimSchedulerMixin.rollout_version:
        return scheduler
    stock = next(base for base in type(scheduler).__mro__ if not hasattr(base, "begin_chunk"))
    lifted = LIFTED.get(stock) or _subclass(stock)
    logger.info("scheduler %s: lifted to %s, with its config", stock.__name__, lifted.__name__)
    ours = lifted.from_config(scheduler.config)
    if hasattr(scheduler, "set_shift"):  # a shift that was set is not in the config
        ours.set_shift(scheduler.shift)
    return ours


def _subclass(stock: type) -> type:
    """A lifted class for a scheduler outside `LIFTED`. `single_step` comes from the nearest scheduler inside;
    re-noising is left to the scheduler's own `step`."""
    nearest = next((LIFTED[base] for base in stock.__mro__ if base in LIFTED), TokenTrimSchedulerMixin)
    return type(f"TokenTrim{stock.__name__}", (nearest, stock), {"__module__": __name__, "renoises": False})
