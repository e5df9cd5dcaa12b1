# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One call's arguments, completed from the checkpoint and checked, as a value. Nothing below reads them again.

Checks never act: none sets a scheduler, draws from a generator or calls a user's function.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AnyFlowFARTransformer3DModel, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import is_compiled_module

from ..tokentrim_backbones.far import check_compression, check_far
from ..tokentrim_backbones.hooks import check_hooks
from ..tokentrim_backbones.parallel import check_parallel
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
from ..tokentrim_policies.registry import DEFAULT_METHOD, Method, make_method
from ..tokentrim_policies.stability import token_grid
from ..tokentrim_views.layout import Layout, WindowLayout
from ..tokentrim_views.registry import make_layout
from .given import image_as_video, read_video
from .partition import (
    count_given_chunks,
    count_given_frames,
    count_latent_frames,
    partition_chunks,
)
from .prompts import PromptChange, check_prompts, plan_prompts, take_first_prompt


ROLLOUTS = ("self_forcing", "rolling_forcing")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TRIM_SETTINGS = ("prune_fraction", "drift_sensitivity", "warmup_chunks", "max_regenerations", "drift_signal")
WINDOW_SETTINGS = ("window_size", "num_sink_frames", "relative_positions", "sink_at_commit")
TENSOR_ARGUMENTS = ("video", "image", "video_latents", "latents", "prompt_embeds", "negative_prompt_embeds")
LIST_ARGUMENTS = ("sigmas", "timesteps", "chunk_partition")
SINK_COLLAPSE = 120  # latent frames from which a sink at absolute positions is known to fail (LoL, arXiv 2601.16914)

REPEATED_CHUNKS = 64  # of a video without an end: as many as checks look ahead

plan_logger = logging.getLogger("tokentrim.plan")


@dataclass(frozen=True)
class RolloutPlan:
    """What one call does.

    Args:
        rollout (`str`): `"self_forcing"` or `"rolling_forcing"`.
        frame_shape (`tuple`): of the latents of a frame, (B, C, H, W).
        height (`int`), width (`int`): of the video in pixels.
        temporal_factor (`int`): frames of a latent frame; the first one is one frame.
        chunk_partition (`list[int]`): latent frames of each chunk; without an end the last size repeats.
        num_frames (`int`, *optional*): of the video, which may end inside its last chunk; `None`: it has no end.
        num_given_chunks (`int`): first chunks that are given, not generated.
        num_protected_frames (`int`): first latent frames that eviction leaves alone.
        num_in_flight (`int`): chunks denoised together.
        method ([`Method`]), layout ([`Layout`]): what later chunks may read, and where it stands.
        num_inference_steps (`int`), sigmas, timesteps: the schedule of a chunk.
        max_sequence_length (`int`): tokens that a prompt is padded to.
        prompt_changes (`dict[int, PromptChange]`): by chunk.
        is_far (`bool`): whether the transformer has a compressed part.
        call (`dict`): the arguments that pass through as they were given.
    """

    rollout: str
    frame_shape: tuple[int, int, int, int]
    height: int
    width: int
    temporal_factor: int
    chunk_partition: list[int]
    num_frames: int | None
    num_given_chunks: int
    num_protected_frames: int
    num_in_flight: int
    method: Method
    layout: Layout
    num_inference_steps: int
    sigmas: Sequence[float] | None
    timesteps: Sequence[float] | None
    max_sequence_length: int
    prompt_changes: dict[int, PromptChange]
    is_far: bool
    call: dict

    @property
    def num_videos(self) -> int:
        return self.frame_shape[0]

    @property
    def is_endless(self) -> bool:
        return self.num_frames is None

    def has_chunk(self, index: int) -> bool:
        return self.is_endless or index < len(self.chunk_partition)

    def chunk_size(self, index: int) -> int:
        """Latent frames of a chunk."""
        return self.chunk_partition[min(index, len(self.chunk_partition) - 1)]

    def chunk_frames(self, index: int) -> int:
        """Frames of a chunk, once it is decoded and what is beyond the video's end is cut off."""
        return self._frames_before(index + 1) - self._frames_before(index)

    def frames_beyond(self, index: int) -> int:
        """Frames beyond the video's end that the latents of a chunk, as `cut` leaves them, decode to."""
        if self.has_chunk(index + 1):
            return 0
        return -(self.num_frames - 1) % self.temporal_factor

    def cut(self, index: int, latents: torch.Tensor) -> torch.Tensor:
        """A chunk's latents, (B, C, frames, H, W), up to the video's end."""
        if self.has_chunk(index + 1):
            return latents
        num_before = sum(self.chunk_partition[:-1])
        return latents[:, :, : count_latent_frames(self.num_frames, self.temporal_factor) - num_before]

    def _frames_before(self, index: int) -> int:
        repeated = max(index - len(self.chunk_partition), 0)
        num_latent_frames = sum(self.chunk_partition[:index]) + repeated * self.chunk_partition[-1]
        num_frames = max((num_latent_frames - 1) * self.temporal_factor + 1, 0)
        return num_frames if self.is_endless else min(num_frames, self.num_frames)

    def count_steps(self, steps_per_chunk: int, first_chunk: int = 0) -> float:
        """Denoising steps of the run from a chunk on, without regenerations."""
        if self.is_endless:
            return math.inf
        num_chunks = len(self.chunk_partition) - max(first_chunk, self.num_given_chunks)
        return num_chunks - 1 + steps_per_chunk if self.num_in_flight > 1 else num_chunks * steps_per_chunk


def plan_rollout(pipe: Any, call: dict, may_be_endless: bool = False) -> RolloutPlan:
    """
    The plan of a call.

    Args:
        pipe: the pipeline.
        call (`dict`): all arguments of its call.
        may_be_endless (`bool`): whether a call that says no length has none, instead of the default.

    Raises:
        `TypeError`, `ValueError`: an argument is no good; its name, its value and what is valid are in the message.
    """
    call = read_call(call)
    _check_components(pipe, call)
    far = pipe.transformer.config.get("full_chunk_limit", 1) > 1  # whether the transformer has a compressed part
    _complete(pipe, call, may_be_endless, far)
    take_first_prompt(call)
    frame_shape, partition, num_given = _plan_shape(pipe, call, far)
    is_endless = call["num_frames"] is None
    sizes = [*partition, *partition[-1:] * (num_given + REPEATED_CHUNKS if is_endless else 0)]
    _check_schedule(pipe.scheduler, call)
    method = make_method(call["method"], {name: call[name] for name in TRIM_SETTINGS})
    check(
        not (far and method.prune_weight),
        "prune_weight",
        method.prune_weight,
        "0 for AnyFlow-FAR, which has no weights",
    )
    num_in_flight = _count_in_flight(pipe, call, method, far)
    for hook in method.hooks:
        if callable(getattr(hook, "check", None)):
            hook.check(sizes[num_given:], method.drift_signal)
    _check_rest(call)
    layout = _plan_layout(pipe, call, sizes, num_in_flight, far)
    _check_rejections(method, layout, sizes, num_in_flight)
    grid = token_grid(frame_shape[2:], pipe.transformer.config.patch_size)
    check_parallel(pipe.transformer, call, layout, method.hooks, sizes, math.prod(grid))
    return RolloutPlan(
        rollout=call["rollout"],
        frame_shape=frame_shape,
        height=call["height"],
        width=call["width"],
        temporal_factor=pipe.vae_scale_factor_temporal,
        chunk_partition=partition,
        num_frames=call["num_frames"],
        num_given_chunks=num_given,
        num_protected_frames=sum(sizes[:num_given]) if call["protect_conditioning"] else 0,
        num_in_flight=num_in_flight,
        method=method,
        layout=layout,
        num_inference_steps=call["num_inference_steps"],
        sigmas=call["sigmas"],
        timesteps=call["timesteps"],
        max_sequence_length=call["max_sequence_length"],
        prompt_changes=plan_prompts(call, layout, frame_shape[0], None if is_endless else len(partition), far),
        is_far=far,
        call=call,
    )


def read_call(call: dict) -> dict:
    """Arguments as the rest reads them: numbers and lists of numbers as Python's, tensors without a graph, frames to
    continue as a tensor."""
    arrays = [name for name in TENSOR_ARGUMENTS if not isinstance(call[name], torch.Tensor)]
    call = {name: value if name in arrays else plain(value) for name, value in call.items()}
    lists = {name: call[name].tolist() for name in LIST_ARGUMENTS if isinstance(call[name], torch.Tensor)}
    return {**call, **lists, "video": None if call["video"] is None else read_video(call["video"])}


# 1. Components, and what was not given


def _check_components(pipe: Any, call: dict) -> None:
    """The pipeline has the components that this call needs, and a transformer that the rollout knows."""
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
    transformer = pipe.transformer._orig_mod if is_compiled_module(pipe.transformer) else pipe.transformer
    check_hooks(transformer)
    if isinstance(transformer, AnyFlowFARTransformer3DModel):
        check_far(transformer.config)
        return
    text_to_video = isinstance(transformer, WanTransformer3DModel) and transformer.config.added_kv_proj_dim is None
    valid = (
        "a text-to-video WanTransformer3DModel with patches of one latent frame, or an AnyFlowFARTransformer3DModel"
    )
    check(text_to_video and transformer.config.patch_size[0] == 1, "transformer", type(transformer).__name__, valid)


def _complete(pipe: Any, call: dict, may_be_endless: bool, far: bool) -> None:
    """Take what was not given from the latents, from the checkpoint, or from our defaults."""
    latents = call["latents"]
    if latents is not None:
        check_tensor("latents", latents, 5, "(batch, channels, latent frames, height, width)")
        spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        of_latents = {
            "height": latents.shape[3] * spatial,
            "width": latents.shape[4] * spatial,
            "num_frames": (latents.shape[2] - 1) * temporal + 1,
        }
        call.update({name: value for name, value in of_latents.items() if call[name] is None})
    _fill_in(pipe, call, "rollout", "self_forcing")
    check_choice("rollout", call["rollout"], ROLLOUTS)
    _fill_in(pipe, call, "num_frames_per_chunk", None if far else 3)
    _fill_in(pipe, call, "num_inference_steps", 4)
    _fill_in(pipe, call, "height", 480)
    _fill_in(pipe, call, "width", 832)
    _fill_in(pipe, call, "max_sequence_length", 512)
    _fill_in(pipe, call, "method", DEFAULT_METHOD)
    _fill_in(pipe, call, "prompt_transition", "keep")
    _fill_in(pipe, call, "num_frames", None if may_be_endless else 81)
    callback = call["callback_on_step_end"]
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        call["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
    name, known = "callback_on_step_end_tensor_inputs", pipe._callback_tensor_inputs
    check_list(name, call[name], str, f"a list of some of {known}")
    check(set(call[name]) <= set(known), name, call[name], f"a list of some of {known}")


def _fill_in(pipe: Any, call: dict, name: str, fallback: Any) -> None:
    """An argument of the call, else the checkpoint's setting, else ours."""
    if call[name] is None:
        call[name] = pipe.config.get(name)
    if call[name] is None:
        call[name] = fallback


# 2. Sizes and draws


def _plan_shape(pipe: Any, call: dict, far: bool) -> tuple[tuple[int, int, int, int], list[int], int]:
    """The shape of the latents of a frame, (B, C, H, W), the partition of all into chunks, and how many of these are
    given."""
    config, spatial = pipe.transformer.config, pipe.vae_scale_factor_spatial
    for name, patch in (("height", config.patch_size[1]), ("width", config.patch_size[2])):
        check_int(name, call[name], 1)
        check(call[name] % (spatial * patch) == 0, name, call[name], f"a multiple of {spatial * patch}")
    check_int("max_sequence_length", call["max_sequence_length"], 1)
    check_int("num_videos_per_prompt", call["num_videos_per_prompt"], 1)
    num_videos = check_prompts(pipe, call) * call["num_videos_per_prompt"]
    height, width = call["height"] // spatial, call["width"] // spatial
    frame_shape = (num_videos, config.in_channels, height, width)
    if call["image"] is not None:
        call["video"] = image_as_video(pipe, call)
    num_given_frames = count_given_frames(pipe, call, frame_shape)
    chunk_partition = partition_chunks(
        call["num_frames"],
        pipe.vae_scale_factor_temporal,
        call["num_frames_per_chunk"],
        call["chunk_partition"],
        config.get("chunk_partition"),
        num_given_frames,
    )
    if far:
        num_chunks = math.inf if call["num_frames"] is None else len(chunk_partition)
        check_compression(call["height"], call["width"], spatial, config, num_chunks)
    _check_draws(call["generator"], call["latents"], (*frame_shape[:2], sum(chunk_partition), height, width))
    return frame_shape, chunk_partition, count_given_chunks(call, num_given_frames, chunk_partition)


def _check_draws(generator: Any, latents: torch.Tensor | None, shape: Sequence[int]) -> None:
    """The initial noise, or what it is drawn from, fits videos of `shape` (B, C, T, H, W)."""
    if latents is not None:
        check(tuple(latents.shape) == tuple(shape), "latents", latents, f"of shape {tuple(shape)} for this call")
    generators = generator if isinstance(generator, list) else [generator]
    of_type = generator is None or all(isinstance(each, torch.Generator) for each in generators)
    check(of_type, "generator", generator, "a torch.Generator or a list of them", TypeError)
    fits = not isinstance(generator, list) or len(generator) == shape[0]
    check(fits, "generator", generator, f"one generator or a list of {shape[0]}, one for each video")


# 3. Schedule, method and layout


def _check_schedule(scheduler: Any, call: dict) -> None:
    """The arguments that say how a chunk is denoised."""
    sigmas, timesteps, renoise = call["sigmas"], call["timesteps"], call["renoise"]
    check_int("num_inference_steps", call["num_inference_steps"], 1)
    check(sigmas is None or timesteps is None, "sigmas", sigmas, "None where `timesteps` is given")
    for name, values, top in (("sigmas", sigmas, 1), ("timesteps", timesteps, scheduler.config.num_train_timesteps)):
        if values is not None:
            check_list(name, values, (int, float), "a list of numbers")
            falling = len(values) > 0 and all(a > b for a, b in zip([top + 1e-6, *values], [*values, 0]))
            check(falling, name, values, f"strictly falling numbers in (0, {top}]")
            check(scheduler.takes(name), name, values, f"None for {type(scheduler).__name__}")
    shift = scheduler.shift if hasattr(type(scheduler), "shift") else scheduler.config.get("shift", 1)
    if timesteps is not None and shift != 1:
        plan_logger.warning(
            "`timesteps` are used as they are, without the scheduler's shift of %s: what a checkpoint names before the"
            " shift, as Self Forcing's [1000, 750, 500, 250], is meant as `sigmas`, here %s",
            shift,
            [round(timestep / scheduler.config.num_train_timesteps, 4) for timestep in timesteps],
        )
    valid = "a scheduler without dynamic shifting, whose `mu` no rollout knows"
    check(not scheduler.config.get("use_dynamic_shifting"), "scheduler", type(scheduler).__name__, valid)
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    flow = prediction == "flow_prediction" and scheduler.config.get("use_flow_sigmas", True)
    valid = "a flow-matching scheduler (prediction_type='flow_prediction', use_flow_sigmas=True)"
    check(flow, "scheduler", scheduler.config, valid)
    check_callables(renoise=renoise)
    valid = f"None: {type(scheduler).__name__} does not re-noise (TokenTrimFlowMatchLCMScheduler does)"
    check(renoise is None or scheduler.renoises, "renoise", renoise, valid)


def _count_in_flight(pipe: Any, call: dict, method: Method, far: bool) -> int:
    """How many chunks are denoised together: they meet a new context at each step, and become final one by one."""
    if call["rollout"] == "self_forcing":
        return 1
    scheduler, signal = pipe.scheduler, method.drift_signal
    check(not far, "rollout", call["rollout"], "'self_forcing' for AnyFlowFARTransformer3DModel")
    valid = "one without a history of steps (Euler or LCM) for rollout='rolling_forcing'"
    check(scheduler.single_step, "scheduler", type(scheduler).__name__, valid)
    check(signal == "final", "drift_signal", signal, "'final' for rollout='rolling_forcing'")
    return len(call["sigmas"] or call["timesteps"] or range(call["num_inference_steps"]))


def _check_rest(call: dict) -> None:
    """What passes through, but has a type."""
    for name in ("use_mean_velocity", "protect_conditioning", "pad_keys"):
        check_bool(name, call[name])
    check(call["use_kv_cache"] is True, "use_kv_cache", call["use_kv_cache"], "True: the rollout reads the cache")
    attention_kwargs = call["attention_kwargs"]
    ok = attention_kwargs is None or isinstance(attention_kwargs, dict)
    check(ok, "attention_kwargs", attention_kwargs, "a dict or None", TypeError)
    check_callables(callback_on_step_end=call["callback_on_step_end"], on_chunk=call["on_chunk"])


def _plan_layout(pipe: Any, call: dict, chunk_partition: Sequence[int], num_in_flight: int, far: bool) -> Layout:
    """The layout that was asked for, or the window that the call's arguments and the checkpoint describe."""
    rolling, given = call["rollout"] == "rolling_forcing", [name for name in WINDOW_SETTINGS if call[name] is not None]
    of_checkpoint = "" if call["layout"] is not None else ", here by the checkpoint: {}"
    _fill_in(pipe, call, "layout", None)
    if call["layout"] is not None:
        for name in given:
            valid = f"None where `layout` is given{of_checkpoint.format(call['layout'])}"
            check(False, name, call[name], valid)
        layout = make_layout(call["layout"])
    else:
        _fill_in(pipe, call, "window_size", None)
        _fill_in(pipe, call, "num_sink_frames", chunk_partition[0] if rolling else 0)
        _fill_in(pipe, call, "relative_positions", rolling)
        _fill_in(pipe, call, "sink_at_commit", not rolling)
        layout = WindowLayout(*(call[name] for name in WINDOW_SETTINGS))
    limit = pipe.transformer.config.full_chunk_limit if far else num_in_flight
    starts = range(max(len(chunk_partition) - limit, 0) + 1)
    longest = max(sum(chunk_partition[start : start + limit]) for start in starts)
    carried = "a chunk" if limit == 1 else "chunks denoised together (one for each step)"
    alone = limit == 1 or not getattr(layout, "one_chunk_a_pass", False)
    valid = "another for a rollout whose passes carry several chunks (Rolling Forcing, AnyFlow-FAR): it counts on one"
    check(alone, "layout", type(layout).__name__, valid)
    if callable(getattr(layout, "check", None)):
        layout.check(longest, f"{limit} chunks in full resolution" if far else carried)
    if isinstance(layout, WindowLayout) and layout.num_sink_frames and not layout.relative_positions:
        if layout.window_size is not None and sum(chunk_partition) > SINK_COLLAPSE:
            plan_logger.warning(
                "a sink at absolute positions is known to fail beyond %d latent frames (sink collapse, arXiv 2601.16914):"
                " pass relative_positions=True where the model allows it",
                SINK_COLLAPSE,
            )
    return layout


def _check_rejections(method: Method, layout: Layout, chunk_partition: Sequence[int], num_in_flight: int) -> None:
    """A chunk that does not enter must not leave the context empty."""
    window_size = getattr(layout, "window_size", None)
    if window_size is None or layout.num_sink_frames > 0:
        return
    shortest = (num_in_flight + 2) * max(chunk_partition)
    for policy in method.policies:
        ok = window_size >= shortest or not getattr(policy, "may_reject", False)
        valid = f"without {type(policy).__name__} with `window_size` {window_size} and no sink: it needs a sink, or"
        check(ok, "method", [type(each).__name__ for each in method.policies], f"{valid} {shortest} latent frames")
