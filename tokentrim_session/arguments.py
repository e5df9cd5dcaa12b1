# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a call, completed from the checkpoint and checked. The rest of the session reads the
[`RolloutPlan`] that they make, and never the arguments.

Checks never act: none sets a scheduler, draws from a generator or calls a function of the user.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import is_compiled_module

from ..tokentrim_backbones.backbone import BackboneOptions, Limits
from ..tokentrim_backbones.hooks import check_hooks
from ..tokentrim_backbones.parallel import check_parallel
from ..tokentrim_backbones.registry import backbone_of
from ..tokentrim_checks import (
    check,
    check_bool,
    check_callables,
    check_choice,
    check_int,
    check_list,
    check_number,
    check_tensor,
    plain,
)
from ..tokentrim_policies.registry import DEFAULT_METHOD, make_method
from ..tokentrim_policies.stability import token_grid
from ..tokentrim_views.layout import Layout, WindowLayout
from ..tokentrim_views.registry import make_layout
from .compatibility import check_method, check_rejections, fit_layout
from .given import image_as_video, read_video
from .host import Pipeline
from .noise import check_draws
from .partition import count_frames, count_given_chunks, partition_chunks
from .plan import Callbacks, Inputs, RolloutPlan, Schedule, Sizes
from .prompts import (
    Prompts,
    check_change,
    check_lengths,
    check_prompts,
    check_unscheduled,
    first_prompt,
    read_schedule,
)
from .schedule import Scheduler, check_schedule, check_scheduler, split_steps


ROLLOUTS = ("self_forcing", "rolling_forcing", "wave_forcing")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TRIM_SETTINGS = ("prune_fraction", "drift_sensitivity", "warmup_chunks", "max_regenerations", "drift_signal")
WINDOW_SETTINGS = ("window_size", "num_sink_frames", "relative_positions", "sink_at_commit")
TENSOR_ARGUMENTS = ("video", "image", "video_latents", "latents", "prompt_embeds", "negative_prompt_embeds")
LIST_ARGUMENTS = ("sigmas", "timesteps", "chunk_partition")
DEFAULTS = {  # of what neither the call nor the checkpoint says
    "rollout": "self_forcing",
    "num_inference_steps": 4,
    "height": 480,
    "width": 832,
    "max_sequence_length": 512,
    "method": DEFAULT_METHOD,
    "prompt_transition": "keep",
    "context_noise": 0.0,
}
REPEATED_CHUNKS = 64  # of a video without an end: as many as checks look ahead


def plan_rollout(pipe: Pipeline, call: dict, may_be_endless: bool = False) -> RolloutPlan:
    """
    The plan of a call.

    Args:
        pipe ([`TokenTrimPipeline`]): the pipeline.
        call (`dict`): all arguments of its call.
        may_be_endless (`bool`): whether a call without a length has no end, instead of the default length.

    Raises:
        `TypeError`, `ValueError`: an argument is invalid; the message names it, its value and what is valid.
    """
    call = read_call(call)
    if call["prompt_schedule"] is None:
        check_unscheduled(call["prompt_transition"], call["blend_chunks"], may_be_endless)
    call.update(first_prompt(call["prompt_schedule"], call["prompt"], call["prompt_embeds"]))
    _check_components(pipe, call)
    limits = backbone_of(pipe.transformer).limits_of(pipe.transformer)
    _complete(pipe, call, may_be_endless)
    prompts = Prompts(*(call[field.name] for field in fields(Prompts)))
    sizes = _plan_sizes(pipe, call, prompts, limits)
    method = make_method(call["method"], {name: call[name] for name in TRIM_SETTINGS})
    schedule = _plan_schedule(pipe.scheduler, call, method.drift_signal, limits)
    callbacks, options = _plan_callbacks(pipe, call), _plan_options(call)
    num_repeated = sizes.num_given_chunks + REPEATED_CHUNKS if sizes.is_endless else 0
    chunk_sizes = [*sizes.chunk_partition, *sizes.chunk_partition[-1:] * num_repeated]
    num_tokens = math.prod(token_grid(sizes.frame_shape[2:], pipe.transformer.config.patch_size))
    check_method(method, limits, chunk_sizes[sizes.num_given_chunks :], num_tokens)
    layout = _plan_layout(pipe, call, chunk_sizes[0])
    layout = fit_layout(layout, limits, schedule.num_in_flight, chunk_sizes)
    check_rejections(method, layout, schedule.num_in_flight, chunk_sizes)
    tokens = [size * num_tokens for size in chunk_sizes]
    check_parallel(pipe.transformer, limits, layout, method.hooks, call["generator"], tokens)
    inputs = _plan_inputs(call, prompts, sizes, layout, limits, pipe.transformer.config.text_dim)
    return RolloutPlan(sizes, schedule, inputs, callbacks, method, layout, options, call["output_type"])


def bind_call(pipe: Pipeline, *args: Any, **kwargs: Any) -> dict:
    """All arguments of a call of the pipeline with these, by name."""
    call = inspect.signature(pipe.__call__).bind(*args, **kwargs)
    call.apply_defaults()
    return dict(call.arguments)


def read_call(call: dict) -> dict:
    """The arguments with Python's numbers and lists, tensors without a graph, and `video` as a tensor."""
    arrays = [name for name in TENSOR_ARGUMENTS if not isinstance(call[name], torch.Tensor)]
    call = {name: value if name in arrays else plain(value) for name, value in call.items()}
    lists = {name: call[name].tolist() for name in LIST_ARGUMENTS if isinstance(call[name], torch.Tensor)}
    return {**call, **lists, "video": None if call["video"] is None else read_video(call["video"])}


# 1. Components, and what the call leaves open


def _check_components(pipe: Pipeline, call: dict) -> None:
    """The pipeline has the components that this call needs."""
    check_number("guidance_scale", call["guidance_scale"], lambda scale: scale >= 0, "a finite number >= 0")
    check_choice("output_type", call["output_type"], OUTPUT_TYPES)
    encodes_negative = call["guidance_scale"] > 1.0 and call["negative_prompt_embeds"] is None
    encodes_text = call["prompt"] is not None or encodes_negative
    gives_frames = call["video"] is not None or call["image"] is not None
    uses_vae = gives_frames or call["output_type"] != "latent"
    unless_embeds = "a component, unless `prompt_embeds` (with guidance, negative ones too) are passed"
    for name, needed, valid in (
        ("tokenizer", encodes_text, unless_embeds),
        ("text_encoder", encodes_text, unless_embeds),
        ("vae", uses_vae, "a component, unless `output_type='latent'` without `video` and `image`"),
        ("transformer", True, "a component"),
        ("scheduler", True, "a component"),
    ):
        check(not needed or getattr(pipe, name, None) is not None, name, None, valid)
    check(isinstance(pipe.scheduler, SchedulerMixin), "scheduler", type(pipe.scheduler).__name__, "a SchedulerMixin")
    check_hooks(pipe.transformer._orig_mod if is_compiled_module(pipe.transformer) else pipe.transformer)


def _complete(pipe: Pipeline, call: dict, may_be_endless: bool) -> None:
    """Take what was not given from the latents, from the checkpoint, or from our defaults."""
    latents = call["latents"]
    if latents is not None:
        check_tensor("latents", latents, 5, "(batch, channels, latent frames, height, width)")
        patch = tuple(pipe.transformer.config.patch_size[1:])
        fits = all(side % step == 0 for side, step in zip(latents.shape[3:], patch))
        check(fits, "latents", latents, f"of a height and width that are multiples of {patch}, the patches")
        spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        of_latents = {
            "height": latents.shape[3] * spatial,
            "width": latents.shape[4] * spatial,
            "num_frames": (latents.shape[2] - 1) * temporal + 1,
        }
        call.update({name: value for name, value in of_latents.items() if call[name] is None})
    defaults = {
        **DEFAULTS,
        "num_frames": None if may_be_endless else 81,
        "num_frames_per_chunk": None if pipe.transformer.config.get("chunk_partition") else 3,
    }
    call.update({name: _setting(pipe, call, name, default) for name, default in defaults.items()})
    check_choice("rollout", call["rollout"], ROLLOUTS)


def _setting(pipe: Pipeline, call: dict, name: str, default: Any = None) -> Any:
    """An argument of the call, else the checkpoint's setting, else ours."""
    value = call.get(name)  # a call that an older version recorded lacks what is new
    value = pipe.config.get(name) if value is None else value
    return default if value is None else value


# 2. The four groups of a plan


def _plan_sizes(pipe: Pipeline, call: dict, prompts: Prompts, limits: Limits) -> Sizes:
    config, spatial, temporal = pipe.transformer.config, pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    height, width, num_frames, repeats = (
        call[name] for name in ("height", "width", "num_frames", "num_videos_per_prompt")
    )
    for name, patch in (("height", config.patch_size[1]), ("width", config.patch_size[2])):
        check_int(name, call[name], 1)
        check(call[name] % (spatial * patch) == 0, name, call[name], f"a multiple of {spatial * patch}")
    check_int("num_videos_per_prompt", repeats, 1)
    check_bool("protect_conditioning", call["protect_conditioning"])
    check_prompts(prompts, config.text_dim, call["guidance_scale"] > 1)
    frame_shape = (len(prompts) * repeats, config.in_channels, height // spatial, width // spatial)
    given, num_given_frames = _count_given_frames(pipe, call, frame_shape)
    partition = partition_chunks(
        num_frames,
        temporal,
        call["num_frames_per_chunk"],
        call["chunk_partition"],
        config.get("chunk_partition"),
        num_given_frames,
    )
    num_given = count_given_chunks(given, num_given_frames, partition, num_frames is None)
    if num_frames is None or len(partition) > limits.chunks_per_pass:
        for name, latent_size, smallest in zip(("height", "width"), frame_shape[2:], limits.min_size):
            valid = f">= {spatial * smallest} for more than {limits.chunks_per_pass} chunks with {limits.model}"
            check(latent_size >= smallest, name, call[name], valid)
    check_draws(call["generator"], call["latents"], (*frame_shape[:2], sum(partition), *frame_shape[2:]))
    num_protected = num_given_frames if call["protect_conditioning"] else 0
    return Sizes(frame_shape, height, width, temporal, partition, num_frames, num_given, num_protected, repeats)


def _count_given_frames(pipe: Pipeline, call: dict, frame_shape: Sequence[int]) -> tuple[str, int]:
    """The argument that gives frames to continue, and how many latent frames they are. An image becomes a video."""
    if call["image"] is not None:
        for name in ("video", "video_latents"):
            check(call[name] is None, name, call[name], "None where `image` is given")
        video = image_as_video(call["image"], pipe.video_processor, call["height"], call["width"])
        call["video"] = video
        return "image", count_frames("image", video, (frame_shape[0], 3, *video.shape[3:]), 1)
    if call["video"] is None:
        if call["video_latents"] is None:
            return "video_latents", 0
        return "video_latents", count_frames("video_latents", call["video_latents"], frame_shape, 1)
    check(call["video_latents"] is None, "video_latents", call["video_latents"], "None where `video` is given")
    shape, video = (frame_shape[0], 3, call["height"], call["width"]), call["video"]
    num_frames = count_frames("video", video, shape, pipe.vae_scale_factor_temporal)
    if not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(f"`video` must be in [0, 1], but is in [{video.min():.3g}, {video.max():.3g}].")
    return "video", num_frames


def _plan_schedule(scheduler: Scheduler, call: dict, drift_signal: str, limits: Limits) -> Schedule:
    rollout, sigmas, timesteps, noise = map(call.get, ("rollout", "sigmas", "timesteps", "context_noise"))
    num_steps, first_steps = split_steps(call["num_inference_steps"], rollout, sigmas or timesteps)
    check_scheduler(scheduler)
    check_schedule(scheduler, sigmas, timesteps, call["renoise"])
    num_in_flight = 1
    if rollout != "self_forcing":  # chunks meet a new context at each step, and become final one by one
        check(limits.max_in_flight is None, "rollout", rollout, f"'self_forcing' for {limits.model}")
        valid = f"one without a history of steps (Euler or LCM) for rollout={rollout!r}"
        check(scheduler.single_step, "scheduler", type(scheduler).__name__, valid)
        check(drift_signal == "final", "drift_signal", drift_signal, f"'final' for rollout={rollout!r}")
        num_in_flight = len(sigmas or timesteps or range(num_steps))
    check_number("context_noise", noise, lambda value: 0 <= value <= 1000, "a timestep from 0 to 1000")
    check(limits.context_noise or noise == 0, "context_noise", noise, f"0 for {limits.model}")
    return Schedule(rollout, num_in_flight, num_steps, sigmas, timesteps, call["guidance_scale"], first_steps, noise)


def _plan_inputs(call: dict, prompts: Prompts, sizes: Sizes, layout: Layout, limits: Limits, text_dim: int) -> Inputs:
    transition, schedule, changes = call["prompt_transition"], call["prompt_schedule"], {}
    if schedule is not None:
        changes = read_schedule(schedule, transition, call["blend_chunks"], sizes.num_prompts)
        changes.pop(0, None)  # `first_prompt` has taken it
    for chunk, change in changes.items():
        check_change(change, layout, limits)
        check_lengths("prompt_schedule", change, prompts, text_dim)
        valid = f"a dict of chunks below {len(sizes.chunk_partition)}, the chunks of the video"
        check(sizes.has_chunk(chunk), "prompt_schedule", chunk, valid)
    transition = transition if isinstance(transition, str) else "keep"  # a dict is about the chunks of the schedule
    given = (call[name] for name in ("generator", "latents", "video", "video_latents"))
    return Inputs(prompts, changes, transition, *given)


def _plan_callbacks(pipe: Pipeline, call: dict) -> Callbacks:
    on_step_end, name = call["callback_on_step_end"], "callback_on_step_end_tensor_inputs"
    official = isinstance(on_step_end, (PipelineCallback, MultiPipelineCallbacks))
    names, known = on_step_end.tensor_inputs if official else call[name], pipe._callback_tensor_inputs
    check_list(name, names, str, f"a list of some of {known}")
    check(set(names) <= set(known), name, names, f"a list of some of {known}")
    check_callables(callback_on_step_end=on_step_end, on_chunk=call["on_chunk"])
    return Callbacks(on_step_end, names, call["renoise"], call["on_chunk"])


# 3. Backbone and layout


def _plan_options(call: dict) -> BackboneOptions:
    for name in ("use_mean_velocity", "pad_keys"):
        check_bool(name, call[name])
    check(call["use_kv_cache"] is True, "use_kv_cache", call["use_kv_cache"], "True: the rollout reads the cache")
    attention_kwargs = call["attention_kwargs"]
    ok = attention_kwargs is None or isinstance(attention_kwargs, dict)
    check(ok, "attention_kwargs", attention_kwargs, "a dict or None", TypeError)
    return BackboneOptions(attention_kwargs, call["use_mean_velocity"], call["pad_keys"])


def _plan_layout(pipe: Pipeline, call: dict, first_chunk: int) -> Layout:
    """The layout of the call or of the checkpoint; by default the window that their settings describe."""
    layout, rolling = _setting(pipe, call, "layout"), call["rollout"] != "self_forcing"
    if layout is not None:
        source = "" if call["layout"] is not None else f", here by the checkpoint: {layout}"
        for name in WINDOW_SETTINGS:
            check(call[name] is None, name, call[name], f"None where `layout` is given{source}")
        return make_layout(layout)
    defaults = (None, first_chunk if rolling else 0, rolling, not rolling)
    return WindowLayout(*(_setting(pipe, call, name, default) for name, default in zip(WINDOW_SETTINGS, defaults)))
