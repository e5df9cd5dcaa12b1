"""Schedulers that return to the start of a chunk, and their effect on schedule and config."""

from inspect import signature

import numpy as np
import pytest
import torch
from builders import randn
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

import tokentrim
from tokentrim import lift_scheduler


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DPM = {**FLOW, "flow_shift": 5.0}
SHAPE = (2, 4, 3, 4, 6)


def unipc():
    return UniPCMultistepScheduler(**FLOW, flow_shift=5.0)


def sde():
    return DPMSolverMultistepScheduler(**DPM, algorithm_type="sde-dpmsolver++")


CONCRETE = {
    "FlowMapEuler": lambda: FlowMapEulerDiscreteScheduler(shift=5.0),
    "FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "FlowMatchLCM": lambda: FlowMatchLCMScheduler(shift=5.0),
    "UniPC": unipc,
}
LIFTED = {
    "stochastic Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=5.0),
    "DPM++": lambda: DPMSolverMultistepScheduler(**DPM),
    "sde-DPM++": sde,
}
ALL = CONCRETE | LIFTED
DRAWING = ("FlowMatchLCM", "stochastic Euler", "sde-DPM++")
every = pytest.mark.parametrize("stock", ALL.values(), ids=ALL)


def flow_of(sample, timestep, context=0.0):
    """Stands for the model: a smooth function of its inputs."""
    return torch.sin(3 * sample + timestep.float() / 300 + context)


def trajectory(scheduler, context=0.0, rows=slice(None), version=0):
    sample, predictions = randn(*SHAPE)[rows], []
    for timestep in scheduler.timesteps:
        sample, x0 = scheduler.step(
            flow_of(sample, timestep, context), timestep, sample, context_version=version, return_dict=False
        )
        predictions.append(x0)
    return [sample, *predictions]


def started(stock, num_steps=4, seeds=(0, 1)):
    scheduler = lift_scheduler(stock())
    scheduler.set_rollout_timesteps(num_steps)
    scheduler.begin_chunk([torch.Generator().manual_seed(seed) for seed in seeds])
    return scheduler


def assert_identical(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CONCRETE)
def test_concrete_classes_lift_to_themselves(name):
    stock = CONCRETE[name]()
    lifted = lift_scheduler(stock)
    assert type(lifted) is getattr(tokentrim, f"TokenTrim{type(stock).__name__}")
    assert lift_scheduler(lifted) is lifted


@every
def test_lifting_keeps_class_and_config(stock):
    lifted = lift_scheduler(stock())
    assert isinstance(lifted, type(stock()))
    ours, theirs = dict(lifted.config), dict(stock().config)
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}


@every
def test_steps_equal_the_stock_schedulers(stock):
    scheduler, sample = stock(), randn(*SHAPE)
    if "sigmas" in signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.array([1.0, 0.75, 0.5, 0.25]), num_inference_steps=4)
    else:
        scheduler.set_timesteps(4)
    draws = "generator" in signature(scheduler.step).parameters
    kwargs = {"generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)]} if draws else {}
    for timestep in scheduler.timesteps:
        sample = scheduler.step(flow_of(sample, timestep), timestep, sample, return_dict=False, **kwargs)[0]
    ours = started(stock)
    assert torch.equal(ours.timesteps, scheduler.timesteps)
    torch.testing.assert_close(trajectory(ours)[0], sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stock", CONCRETE.values(), ids=CONCRETE)
@pytest.mark.parametrize(
    "num_steps, timesteps",
    [(4, [1000, 937.5, 833.333333, 625]), (5, [1000, 952.380952, 882.352941, 769.230769, 555.555556])],
)
def test_default_schedule_is_linear_before_the_shift(stock, num_steps, timesteps):
    sigmas = started(stock, num_steps).sigmas
    assert sigmas.tolist() == pytest.approx([t / 1000 for t in timesteps] + [0], abs=2e-6)


@pytest.mark.parametrize("stock", CONCRETE.values(), ids=CONCRETE)
def test_given_sigmas_are_shifted(stock):
    scheduler = lift_scheduler(stock())
    scheduler.set_rollout_timesteps(4, sigmas=[1.0, 0.5])
    assert scheduler.sigmas.tolist() == pytest.approx([1, 2.5 / 3, 0], abs=2e-6)


@pytest.mark.parametrize("name, argument", [("UniPC", "timesteps"), ("DPM++", "sigmas"), ("Heun", "timesteps")])
def test_unsupported_schedules_raise(name, argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be None for TokenTrim"):
        lift_scheduler(ALL[name]()).set_rollout_timesteps(2, **{argument: [1.0, 0.5]})


@every
def test_rewind_repeats_the_trajectory_bit_for_bit(stock):
    """After a whole trajectory, and after one that broke off while the solver held history of another context."""
    scheduler = started(stock)
    first = trajectory(scheduler)
    scheduler.rewind()
    assert_identical(trajectory(scheduler), first)
    scheduler.rewind()
    sample = randn(*SHAPE)
    for timestep in scheduler.timesteps[:2]:
        sample = scheduler.step(flow_of(sample, timestep, 9.0), timestep, sample, return_dict=False)[0]
    scheduler.rewind()
    assert_identical(trajectory(scheduler), first)


@every
def test_rewound_on_another_context_equals_a_fresh_trajectory(stock):
    scheduler = started(stock)
    trajectory(scheduler, context=0.0, version=1)
    scheduler.rewind()
    assert_identical(trajectory(scheduler, context=1.0, version=2), trajectory(started(stock), context=1.0))


@every
def test_rewind_of_some_videos_repeats_their_rows(stock):
    scheduler = started(stock)
    first = trajectory(scheduler)
    scheduler.rewind([1])
    for whole, row in zip(first, trajectory(scheduler, rows=[1]), strict=True):
        torch.testing.assert_close(row, whole[[1]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", DRAWING)
def test_next_chunk_draws_new_noise(name):
    scheduler = lift_scheduler(ALL[name]())
    scheduler.set_rollout_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    scheduler.begin_chunk(generator)
    first = trajectory(scheduler)
    scheduler.begin_chunk(generator)
    assert not torch.equal(trajectory(scheduler)[0], first[0])


@every
def test_new_chunk_resets_the_solver(stock):
    scheduler = started(stock)
    trajectory(scheduler, context=5.0)
    scheduler.begin_chunk([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert_identical(trajectory(scheduler), trajectory(started(stock)))


@every
def test_prediction_of_a_step_is_x0(stock):
    """x0 = x_t - sigma * flow, recovered from a sample mixed from a known x0 and eps."""
    scheduler = started(stock)
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    for index, timestep in enumerate(scheduler.timesteps):
        sample = (1 - scheduler.sigmas[index]) * x0 + scheduler.sigmas[index] * eps
        output = scheduler.step(eps - x0, timestep, sample.float())
        torch.testing.assert_close(output.pred_original_sample, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["FlowMatchLCM", "stochastic Euler"])
def test_given_noise_renoises(name):
    """(1 - sigma) x0 + sigma eps, and no noise after the last step."""
    scheduler = lift_scheduler(ALL[name]())
    scheduler.set_rollout_timesteps(2)
    x0, first, second = (randn(*SHAPE, seed=seed) for seed in (1, 2, 3))
    sigma = scheduler.sigmas[1]
    sample, _ = scheduler.step(first - x0, scheduler.timesteps[0], first, noise=second, return_dict=False)
    torch.testing.assert_close(sample, (1 - sigma) * x0 + sigma * second, atol=1e-5, rtol=0)
    sample, _ = scheduler.step(second - x0, scheduler.timesteps[1], sample, return_dict=False)
    torch.testing.assert_close(sample, x0, atol=1e-5, rtol=0)


@every
def test_changed_context_within_a_trajectory_raises(stock):
    scheduler, sample = started(stock), randn(*SHAPE)
    first, second = scheduler.timesteps[:2]
    scheduler.step(sample, first, sample, context_version=1)
    with pytest.raises(RuntimeError, match="version 1 .* version 2"):
        scheduler.step(sample, second, sample, context_version=2)
    scheduler.rewind()
    scheduler.step(sample, first, sample, context_version=2)


def test_noise_for_a_scheduler_without_renoising_raises():
    scheduler, sample = started(unipc), randn(*SHAPE)
    with pytest.raises(ValueError, match="`noise`"):
        scheduler.step(sample, scheduler.timesteps[0], sample, noise=sample)


def test_step_before_set_timesteps_raises():
    with pytest.raises(RuntimeError, match="set_timesteps"):
        lift_scheduler(unipc()).step(randn(1), 1000, randn(1))


@pytest.mark.parametrize("stock", CONCRETE.values(), ids=CONCRETE)
def test_config_survives_saving(stock, tmp_path):
    """The folder of a lifted scheduler is also the stock scheduler's."""
    ours = lift_scheduler(stock())
    ours.save_pretrained(tmp_path)
    for cls in (type(ours), type(stock())):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls
        assert 5.0 in (loaded.config.get("shift"), loaded.config.get("flow_shift"))
    loaded = type(ours).from_pretrained(tmp_path)
    loaded.set_rollout_timesteps(4)
    loaded.begin_chunk([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert_identical(trajectory(loaded), trajectory(started(stock)))


class HalfEuler(FlowMatchEulerDiscreteScheduler):
    """A user's scheduler, whose steps are half as long."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return super().step(0.5 * model_output, timestep, sample, generator=generator, return_dict=return_dict)


@pytest.mark.parametrize("stochastic", [False, True])
def test_lifted_subclass_takes_its_own_steps(stochastic):
    scheduler = lift_scheduler(HalfEuler(shift=5.0, stochastic_sampling=stochastic))
    assert scheduler.single_step and not scheduler.renoises and type(scheduler).__name__ == "TokenTrimHalfEuler"
    stock = HalfEuler(shift=5.0, stochastic_sampling=stochastic)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    for each in (scheduler, stock):
        each.set_timesteps(4, sigmas=sigmas)
    sample = expected = randn(*SHAPE)
    scheduler.begin_chunk(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for timestep in stock.timesteps:
        sample = scheduler.step(flow_of(sample, timestep), timestep, sample).prev_sample
        flow = flow_of(expected, timestep)
        expected = stock.step(flow, timestep, expected, generator=generator, return_dict=False)[0]
    assert torch.equal(sample, expected)
