# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a rollout asks of a scheduler, and the arguments that say how a chunk is denoised."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..tokentrim_checks import check, check_callables, check_int, check_list


MAX_STEPS = 10_000


schedule_logger = logging.getLogger("tokentrim.plan")


class Scheduler(Protocol):
    """A scheduler that can return to the start of a chunk, as `TokenTrimSchedulerMixin` makes and documents it."""

    config: Any
    timesteps: torch.Tensor
    renoises: bool
    single_step: bool
    draws_inside: bool

    def takes(self, name: str) -> bool: ...

    def set_rollout_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None: ...

    def begin_chunk(self, generator: torch.Generator | list[torch.Generator] | None = None) -> None: ...

    def rewind(self, videos: list[int] | None = None) -> None: ...

    def seek(self, step: int) -> None: ...

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        context_version: int | None = None,
        return_dict: bool = True,
    ) -> Any: ...

    def predict_original_sample(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor: ...


def check_scheduler(scheduler: Scheduler) -> None:
    """
    Raises:
        `ValueError`: the scheduler is not a flow-matching one, or its shift depends on the size of the video.
    """
    valid = "a scheduler without dynamic shifting, whose `mu` no rollout knows"
    check(not scheduler.config.get("use_dynamic_shifting"), "scheduler", type(scheduler).__name__, valid)
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    flow = prediction == "flow_prediction" and scheduler.config.get("use_flow_sigmas", True)
    valid = "a flow-matching scheduler (prediction_type='flow_prediction', use_flow_sigmas=True)"
    check(flow, "scheduler", scheduler.config, valid)


def split_steps(
    num_inference_steps: Any, rollout: str, levels: Sequence[float] | None = None
) -> tuple[int, int | None]:
    """
    Steps of a chunk, and those of the first generated chunk, where they differ. With custom `levels` they do not.

    Raises:
        `TypeError`, `ValueError`: it is neither an int nor such a dict.
    """
    name, steps = "num_inference_steps", num_inference_steps
    if not isinstance(steps, dict):
        check_int(name, steps, 1, " or a dict of two, {'first': 4, 'rest': 2}", MAX_STEPS)
        return steps, None
    check(steps.keys() == {"first", "rest"}, name, steps, "an int or a dict such as {'first': 4, 'rest': 2}")
    for part, each in steps.items():
        check_int(f"{name}: {part}", each, 1, maximum=MAX_STEPS)
    check(rollout == "self_forcing", name, steps, f"an int for rollout={rollout!r}")
    return steps["rest"], steps["first"] if levels is None else None


def check_schedule(
    scheduler: Scheduler,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    renoise: Callable | None,
) -> None:
    """
    Raises:
        `TypeError`, `ValueError`: an argument is invalid, or the scheduler does not take it.
    """
    check(sigmas is None or timesteps is None, "sigmas", sigmas, "None where `timesteps` is given")
    for name, values, top in (("sigmas", sigmas, 1), ("timesteps", timesteps, scheduler.config.num_train_timesteps)):
        if values is not None:
            check_list(name, values, (int, float), "a list of numbers")
            falling = len(values) > 0 and all(a > b for a, b in zip([top + 1e-6, *values], [*values, 0]))
            check(falling, name, values, f"strictly falling numbers in (0, {top}]")
            check(scheduler.takes(name), name, values, f"None for {type(scheduler).__name__}")
    shift = scheduler.shift if hasattr(type(scheduler), "shift") else scheduler.config.get("shift", 1)
    if timesteps is not None and shift != 1:
        schedule_logger.warning(
            "`timesteps` are used as they are, without the scheduler's shift of %s. Timesteps that a checkpoint lists"
            " before the shift, such as Self Forcing's [1000, 750, 500, 250], are passed as `sigmas`, here %s",
            shift,
            [round(timestep / scheduler.config.num_train_timesteps, 4) for timestep in timesteps],
        )
    check_callables(renoise=renoise)
    valid = f"None: {type(scheduler).__name__} does not re-noise (TokenTrimFlowMatchLCMScheduler does)"
    check(renoise is None or scheduler.renoises, "renoise", renoise, valid)
