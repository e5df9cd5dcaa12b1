# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a call may contain: every argument is checked at the door, before any model runs.

Each function raises `TypeError` or `ValueError` naming the argument, its value and what would be valid.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AnyFlowFARTransformer3DModel, WanTransformer3DModel
from diffusers.utils.torch_utils import is_compiled_module

from .tokentrim_anchor import REANCHORINGS


DRIFT_SIGNALS = ("final", "first_step")
ROLLOUTS = ("self_forcing", "rolling_forcing")
FLOWMO_CHUNKS = ("first", "all")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check(ok: bool, name: str, value: Any, valid: str, error: type[Exception] = ValueError) -> None:
    """Raise `error` unless `ok`."""
    if not ok:
        value = f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise error(f"`{name}` has to be {valid}, but is {value}.")


def check_int(name: str, value: Any, minimum: int) -> None:
    check(isinstance(value, int) and not isinstance(value, bool), name, value, f"an int >= {minimum}", TypeError)
    check(value >= minimum, name, value, f"an int >= {minimum}")


def check_number(name: str, value: Any, ok, valid: str) -> None:
    check(isinstance(value, (int, float)) and not isinstance(value, bool), name, value, valid, TypeError)
    check(math.isfinite(value) and ok(value), name, value, valid)


def check_bool(name: str, value: Any) -> None:
    check(isinstance(value, bool), name, value, "True or False", TypeError)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    check(isinstance(value, str), name, value, f"one of {list(choices)}", TypeError)
    check(value in choices, name, value, f"one of {list(choices)}")


def check_list(name: str, value: Any, of_type: type | tuple[type, ...], valid: str) -> None:
    of_types = isinstance(value, (list, tuple)) and all(isinstance(each, of_type) for each in value)
    check(of_types, name, value, valid, TypeError)


def check_reanchor(reanchor: Any, reanchor_tolerance: Any, reanchor_patience: Any) -> None:
    """Refuse re-anchorings that do not exist, and a tolerance without one."""
    if reanchor is not None:
        check_choice("reanchor", reanchor, tuple(REANCHORINGS))
    check_int("reanchor_patience", reanchor_patience, 1)
    if reanchor_tolerance is not None:
        check_number("reanchor_tolerance", reanchor_tolerance, lambda value: value > 0, "a finite number > 0, or None")
        check(reanchor is not None, "reanchor_tolerance", reanchor_tolerance, "None without `reanchor`")


def check_quarantine(
    quarantine_sensitivity: Any,
    window_size: int | None,
    num_sink_frames: int,
    chunk_partition: Sequence[int],
    num_window_chunks: int,
) -> None:
    """How abnormal a chunk has to be to be kept from the context, which must not be left empty."""
    if quarantine_sensitivity is None:
        return
    valid = "a finite number >= 0, or None"
    check_number("quarantine_sensitivity", quarantine_sensitivity, lambda value: value >= 0, valid)
    shortest = (num_window_chunks + 2) * max(chunk_partition)
    some_context = num_sink_frames > 0 or window_size is None or window_size >= shortest
    valid = (
        f"None with `window_size` {window_size} and no sink: it needs a sink, or a window of {shortest} latent frames"
    )
    check(some_context, "quarantine_sensitivity", quarantine_sensitivity, valid)


def check_callables(**arguments: Any) -> None:
    for name, value in arguments.items():
        check(value is None or callable(value), name, value, "callable or None", TypeError)


def check_attention_kwargs(attention_kwargs: Any) -> None:
    ok = attention_kwargs is None or isinstance(attention_kwargs, dict)
    check(ok, "attention_kwargs", attention_kwargs, "a dict or None", TypeError)


def check_tensor(name: str, value: Any, ndim: int, layout: str) -> None:
    """A floating-point tensor of `ndim` dimensions without NaN or Inf."""
    check(isinstance(value, torch.Tensor), name, value, f"a tensor {layout}", TypeError)
    check(value.is_floating_point(), name, value.dtype, f"a floating-point tensor {layout}", TypeError)
    check(value.ndim == ndim, name, value, f"a tensor {layout}")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` has to be finite, but holds NaN or Inf.")


def check_method(
    token_trim: bool,
    prune_fraction: float,
    drift_sensitivity: float,
    warmup_chunks: int,
    max_regenerations: int,
    drift_signal: str,
) -> None:
    """The arguments of TokenTrim itself."""
    check_bool("token_trim", token_trim)
    check_number("prune_fraction", prune_fraction, lambda p: 0 < p < 1, "a number between 0 and 1, both excluded")
    check_number("drift_sensitivity", drift_sensitivity, lambda x: x >= 0, "a finite number >= 0")
    check_int("warmup_chunks", warmup_chunks, 0)
    check_int("max_regenerations", max_regenerations, 0)
    check_choice("drift_signal", drift_signal, DRIFT_SIGNALS)


def check_context(
    window_size: int | None,
    num_sink_frames: int,
    relative_positions: bool,
    chunk_partition: Sequence[int],
    num_window_chunks: int,
    full_chunk_limit: int,
    use_kv_cache: bool,
) -> None:
    """The arguments that say what a chunk may attend to; up to `num_window_chunks` are denoised together, and
    `full_chunk_limit` are in full resolution."""
    check_int("num_sink_frames", num_sink_frames, 0)
    check_bool("relative_positions", relative_positions)
    check(use_kv_cache is True, "use_kv_cache", use_kv_cache, "True: TokenTrim acts on the cache")
    if window_size is not None:
        check_int("window_size", window_size, 1)
        num_together = max(num_window_chunks, full_chunk_limit)
        starts = range(max(len(chunk_partition) - num_together, 0) + 1)
        together = max(sum(chunk_partition[start : start + num_together]) for start in starts)
        shortest = num_sink_frames + together
        what = "a chunk" if num_together == 1 else "chunks denoised together (one for each step)"
        if full_chunk_limit > 1:
            what = f"{full_chunk_limit} chunks in full resolution"
        valid = f"None or >= {shortest}: {num_sink_frames} sink frames and {what} of {together} latent frames"
        check(window_size >= shortest, "window_size", window_size, valid)


def check_flowmo(
    iterations: int, learning_rate: float, steps: Any, chunks: str, num_frames: int, drift_signal: str
) -> None:
    """The arguments of FlowMo; `num_frames` is the least that a guided chunk has."""
    check_int("flowmo_iterations", iterations, 0)
    check_number("flowmo_learning_rate", learning_rate, lambda rate: rate > 0, "a finite number > 0")
    check_choice("flowmo_chunks", chunks, FLOWMO_CHUNKS)
    if steps is not None:
        check_list("flowmo_steps", steps, int, "a list of ints")
        check(min(steps, default=0) >= 0, "flowmo_steps", steps, "a list of ints >= 0, or None")
    if iterations > 0:
        valid = "0 for chunks of less than 3 latent frames, whose motion has no variance"
        check(num_frames >= 3, "flowmo_iterations", iterations, valid)
        valid = "'first' for drift_signal='first_step', whose flow would be of the latents before guidance"
        check(chunks == "first" or drift_signal == "final", "flowmo_chunks", chunks, valid)


def check_rollout(rollout: str, scheduler: Any, drift_signal: str, full_chunk_limit: int) -> None:
    """Chunks that are denoised together meet a new context at each step, and become final one by one."""
    if rollout == "rolling_forcing":
        check(full_chunk_limit == 1, "rollout", rollout, "'self_forcing' for AnyFlowFARTransformer3DModel")
        valid = "one without a history of steps (Euler or LCM) for rollout='rolling_forcing'"
        check(scheduler.single_step, "scheduler", type(scheduler).__name__, valid)
        check(drift_signal == "final", "drift_signal", drift_signal, "'final' for rollout='rolling_forcing'")


def check_schedule(
    scheduler: Any,
    num_inference_steps: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    renoise: Any,
) -> None:
    """The arguments that say how a chunk is denoised."""
    check_int("num_inference_steps", num_inference_steps, 1)
    check(sigmas is None or timesteps is None, "sigmas", sigmas, "None where `timesteps` is given")
    for name, values, top in (("sigmas", sigmas, 1), ("timesteps", timesteps, scheduler.config.num_train_timesteps)):
        if values is not None:
            check_list(name, values, (int, float), "a list of numbers")
            falling = len(values) > 0 and all(a > b for a, b in zip([top + 1e-6, *values], [*values, 0]))
            check(falling, name, values, f"strictly falling numbers in (0, {top}]")
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    flow = prediction == "flow_prediction" and scheduler.config.get("use_flow_sigmas", True)
    valid = "a flow-matching scheduler (prediction_type='flow_prediction', use_flow_sigmas=True)"
    check(flow, "scheduler", scheduler.config, valid)
    check_callables(renoise=renoise)
    valid = f"None: {type(scheduler).__name__} does not re-noise (TokenTrimFlowMatchLCMScheduler does)"
    check(renoise is None or scheduler.renoises, "renoise", renoise, valid)


def check_components(pipe: Any, encodes_text: bool, encodes_video: bool, output_type: str) -> None:
    """The pipeline has the components that this call needs, and a transformer that the rollout knows."""
    check_choice("output_type", output_type, OUTPUT_TYPES)
    unless_embeds = "a component, unless `prompt_embeds` (with guidance, negative ones too) are passed"
    for name, needed, valid in (
        ("tokenizer", encodes_text, unless_embeds),
        ("text_encoder", encodes_text, unless_embeds),
        (
            "vae",
            encodes_video or output_type != "latent",
            "a component, unless `output_type='latent'` without `video`",
        ),
        ("transformer", True, "a component"),
        ("scheduler", True, "a component"),
    ):
        check(not needed or getattr(pipe, name, None) is not None, name, None, valid)
    transformer = pipe.transformer._orig_mod if is_compiled_module(pipe.transformer) else pipe.transformer
    if isinstance(transformer, AnyFlowFARTransformer3DModel):
        check_far(transformer.config)
        return
    text_to_video = isinstance(transformer, WanTransformer3DModel) and transformer.config.added_kv_proj_dim is None
    valid = (
        "a text-to-video WanTransformer3DModel with patches of one latent frame, or an AnyFlowFARTransformer3DModel"
    )
    check(text_to_video and transformer.config.patch_size[0] == 1, "transformer", type(transformer).__name__, valid)


def check_far(config: Any) -> None:
    """What an AnyFlow-FAR transformer's config says is what its forward can do."""
    patch, large, limit = tuple(config.patch_size), tuple(config.compressed_patch_size), config.full_chunk_limit
    check(patch[0] == 1 and patch[1] == patch[2], "transformer.config.patch_size", patch, "(1, n, n)")
    whole = large[0] == 1 and not any(size % patch[1] for size in large[1:])
    valid = f"(1, h, w) with multiples of {patch[1]}"
    check(whole, "transformer.config.compressed_patch_size", large, valid)
    valid = "an int >= 2: the current chunk and at least one in full resolution"
    check(limit >= 2, "transformer.config.full_chunk_limit", limit, valid)


def partition_chunks(
    num_frames: int,
    temporal_factor: int,
    num_frames_per_chunk: int | None,
    chunk_partition: Sequence[int] | None,
    of_checkpoint: Sequence[int] | None = None,
) -> list[int]:
    """Latent frames of each chunk of a video of `num_frames` frames.

    A checkpoint's own partition gives the size of the first chunk, which may be another, and of those that follow; the
    last one is what is left.
    """
    check_int("num_frames", num_frames, 1)
    if num_frames_per_chunk is not None:
        check_int("num_frames_per_chunk", num_frames_per_chunk, 1)
    num_latent_frames, rest = divmod(num_frames - 1, temporal_factor)
    num_latent_frames += 1
    if chunk_partition is not None:
        check_list("chunk_partition", chunk_partition, int, "a list of ints")
        fits = min(chunk_partition, default=0) > 0 and not rest and sum(chunk_partition) == num_latent_frames
        valid = f"positive ints that sum to the {num_latent_frames} latent frames of num_frames={num_frames}"
        check(fits, "chunk_partition", chunk_partition, valid)
        return list(chunk_partition)
    if of_checkpoint is not None:
        below = num_frames - rest
        valid = f"{temporal_factor}n + 1, such as {below} or {below + temporal_factor}"
        check(not rest, "num_frames", num_frames, valid)
        if num_frames_per_chunk is None and sum(of_checkpoint) == num_latent_frames:
            return list(of_checkpoint)
        first, size, *_ = [*of_checkpoint, *of_checkpoint]
        first, size = min(first, num_latent_frames), num_frames_per_chunk or size
        num_chunks, last = divmod(num_latent_frames - first, size)
        return [first] + [size] * num_chunks + [last] * (last > 0)
    num_chunks = max(num_latent_frames // num_frames_per_chunk, 1)
    below, above = ((n * num_frames_per_chunk - 1) * temporal_factor + 1 for n in (num_chunks, num_chunks + 1))
    valid = f"whole chunks of {num_frames_per_chunk} latent frames, such as {below} or {above}"
    check(not rest and num_latent_frames % num_frames_per_chunk == 0, "num_frames", num_frames, valid)
    return [num_frames_per_chunk] * num_chunks


def check_compression(height: int, width: int, spatial_factor: int, config: Any, num_chunks: int) -> None:
    """A video of AnyFlow-FAR whose chunks get compressed is at least a compressed patch high and wide."""
    for name, value, patch in zip(("height", "width"), (height, width), config.compressed_patch_size[1:]):
        smallest = spatial_factor * patch
        valid = f">= {smallest}, a compressed patch, for more than {config.full_chunk_limit} chunks"
        check(num_chunks <= config.full_chunk_limit or value >= smallest, name, value, valid)


def check_sizes(
    height: int,
    width: int,
    spatial_factor: int,
    patch_size: Sequence[int],
    max_sequence_length: int,
    num_videos_per_prompt: int,
) -> None:
    """Whole patches fill a latent frame; the counts are counts."""
    for name, value, patch in (("height", height, patch_size[1]), ("width", width, patch_size[2])):
        check_int(name, value, 1)
        check(value % (spatial_factor * patch) == 0, name, value, f"a multiple of {spatial_factor * patch}")
    check_int("max_sequence_length", max_sequence_length, 1)
    check_int("num_videos_per_prompt", num_videos_per_prompt, 1)


def check_prompts(prompt: Any, negative_prompt: Any, batch_size: int) -> None:
    """Texts are texts, and as many negative ones as there are prompts."""
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if isinstance(texts, list):
            check(all(isinstance(text, str) for text in texts), name, texts, "a str or a list of str", TypeError)
            check(len(texts) == max(batch_size, 1), name, texts, f"a str or a list of {max(batch_size, 1)}")


def check_draws(generator: Any, latents: torch.Tensor | None, shape: Sequence[int]) -> None:
    """The initial noise, or what it is drawn from, fits videos of `shape` (B, C, T, H, W)."""
    if latents is not None:
        check(tuple(latents.shape) == tuple(shape), "latents", latents, f"of shape {tuple(shape)} for this call")
    generators = generator if isinstance(generator, list) else [generator]
    of_type = generator is None or all(isinstance(each, torch.Generator) for each in generators)
    check(of_type, "generator", generator, "a torch.Generator or a list of them", TypeError)
    fits = not isinstance(generator, list) or len(generator) == shape[0]
    check(fits, "generator", generator, f"one generator or a list of {shape[0]}, one for each video")


def check_noise(noise: Any, chunk: int, step: int, shape: Sequence[int]) -> None:
    """What `renoise(chunk, step)` gave."""
    check_tensor(f"renoise({chunk}, {step})", noise, 5, "(batch, channels, latent frames, height, width)")
    check(tuple(noise.shape) == tuple(shape), f"renoise({chunk}, {step})", noise, f"of shape {tuple(shape)}")


def check_callback_outputs(outputs: Any, latents: torch.Tensor) -> None:
    """What `callback_on_step_end` gave back: a dict, and latents that the rollout can go on with."""
    name, valid = "callback_on_step_end", "a function that returns a dict of tensors"
    check(isinstance(outputs, dict), name, outputs, valid, TypeError)
    returned = outputs.get("latents", latents)
    check_tensor("callback_on_step_end: latents", returned, latents.ndim, "like the latents that it was given")
    check(returned.shape == latents.shape, f"{name}: latents", returned, f"of shape {tuple(latents.shape)}")


def check_prompt_embeds(prompt_embeds: Any, negative_prompt_embeds: Any, text_dim: int) -> None:
    """Text embeddings given by the user are (B, text, text_dim), alike for both guidance branches."""
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is not None:
            check_tensor(name, embeds, 3, "(batch, text, dim)")
            check(len(embeds) > 0 and embeds.shape[-1] == text_dim, name, embeds, f"(batch, text, {text_dim})")
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        alike = prompt_embeds.shape == negative_prompt_embeds.shape
        valid = f"shaped like `prompt_embeds`, {tuple(prompt_embeds.shape)}"
        check(alike, "negative_prompt_embeds", negative_prompt_embeds, valid)


def count_given_chunks(
    video: Any,
    video_latents: Any,
    spatial_factor: int,
    temporal_factor: int,
    shape: Sequence[int],
    chunk_partition: Sequence[int],
) -> int:
    """How many chunks the conditioning frames fill: whole chunks, and at least one is left to generate."""
    num_videos, channels, _, height, width = shape
    if video is not None:
        name, given, spatial = "video", video, (3, height * spatial_factor, width * spatial_factor)
    elif video_latents is not None:
        name, given, spatial, temporal_factor = "video_latents", video_latents, (channels, height, width), 1
    else:
        return 0
    check(video is None or video_latents is None, "video_latents", video_latents, "None where `video` is given")
    layout = "(batch, frames, {}, {}, {})".format(*spatial)
    check_tensor(name, given, 5, layout)
    check(tuple(given.shape[2:]) == spatial, name, given, layout)
    check(num_videos % len(given) == 0, name, given, f"a batch that divides the {num_videos} videos")
    num_frames, rest = divmod(given.shape[1] - 1, temporal_factor)
    num_frames += 1
    ends = [sum(chunk_partition[: n + 1]) for n in range(len(chunk_partition) - 1)]
    valid = f"as many latent frames as fill whole chunks and leave one to generate: one of {ends}"
    check(not rest and num_frames in ends, name, given, valid)
    if video is not None and not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(f"`video` has to be in [0, 1], but is in [{video.min():.3g}, {video.max():.3g}].")
    return ends.index(num_frames) + 1
