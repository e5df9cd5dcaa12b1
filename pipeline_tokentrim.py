# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim (arXiv 2602.00268) for causal video diffusion models in Diffusers: the pipeline."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from transformers import AutoTokenizer, UMT5EncoderModel


try:
    from diffusers import (
        AnyFlowFARPipeline,
        AnyFlowFARTransformer3DModel,
        AutoencoderKLWan,
        FlowMapEulerDiscreteScheduler,
        WanTransformer3DModel,
    )
except ImportError as error:
    from diffusers import __version__

    raise ImportError(
        f"TokenTrim needs diffusers 0.39.0 or newer, but {__version__} is here: `pip install -U diffusers`."
    ) from error

from .tokentrim_anchor import Anchor
from .tokentrim_attention import WanBackbone
from .tokentrim_cache import RollingKVCache
from .tokentrim_far import FARBackbone
from .tokentrim_flowmo import checkpointed, guide
from .tokentrim_inputs import (
    ROLLOUTS,
    check,
    check_attention_kwargs,
    check_bool,
    check_callables,
    check_callback_outputs,
    check_choice,
    check_components,
    check_compression,
    check_context,
    check_draws,
    check_flowmo,
    check_list,
    check_method,
    check_noise,
    check_number,
    check_prompt_embeds,
    check_prompts,
    check_quarantine,
    check_reanchor,
    check_rollout,
    check_schedule,
    check_sizes,
    check_tensor,
    count_given_chunks,
    partition_chunks,
)
from .tokentrim_output import TokenTrimPipelineOutput
from .tokentrim_policy import TokenTrimPolicy
from .tokentrim_quarantine import Quarantine, without
from .tokentrim_saving import copy_code, name_our_classes, name_stock_classes
from .tokentrim_scheduler import lift_scheduler
from .tokentrim_stability import token_grid


class _Renoise:
    """The noise that re-noises each chunk after each step: drawn once, so that a regeneration repeats it."""

    def __init__(self, given, generator, shape, chunk_partition, num_window_chunks, device):
        self.given = given
        self.generator = generator
        self.shape = shape
        self.chunk_partition = chunk_partition
        self.num_window_chunks = num_window_chunks
        self.device = device
        self.drawn: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, chunk: int, step: int) -> torch.Tensor:
        """(B, C, frames of the chunk, H, W), in fp32."""
        if (chunk, step) not in self.drawn:
            in_reach = chunk - self.num_window_chunks
            self.drawn = {key: noise for key, noise in self.drawn.items() if key[0] > in_reach}
            shape = (*self.shape[:2], self.chunk_partition[chunk], *self.shape[3:])
            if self.given is None:
                noise = randn_tensor(shape, generator=self.generator, device=self.device, dtype=torch.float32)
            else:
                noise = self.given(chunk, step)
                check_noise(noise, chunk, step, shape)
            self.drawn[chunk, step] = noise.to(self.device, torch.float32)
        return self.drawn[chunk, step]


@dataclass
class _InFlight:
    """A chunk on its way: latents (B, C, frames, H, W) after `step` denoising steps."""

    latents: torch.Tensor
    step: int = 0


@dataclass
class _FlowMo:
    """Which chunks and which of their denoising steps FlowMo guides, and how."""

    chunks: Sequence[int]
    steps: Sequence[int]
    iterations: int
    learning_rate: float


@dataclass
class _RolloutState:
    """What one call fixes for all its chunks; the prompt, which a callback may change; the chunks in flight.

    Self Forcing has a window of one chunk, which takes all its steps; Rolling Forcing one of as many chunks as there
    are steps, each a step behind the chunk before it.
    """

    noise_chunks: list[torch.Tensor]
    num_window_chunks: int
    flowmo: _FlowMo
    quarantine: Quarantine
    anchor: Anchor
    backbone: WanBackbone | FARBackbone
    cache: RollingKVCache
    renoise: _Renoise
    solver_generators: list[torch.Generator] | None
    drift_signal: str
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    callback: Callable | None
    callback_tensor_inputs: list[str]
    on_chunk: Callable | None
    progress: Any = None
    window: list[_InFlight] = field(default_factory=list)  # before the attempt at the current chunk
    attempt: list[_InFlight] = field(default_factory=list)  # after it: the current chunk first
    first_flow: torch.Tensor | None = None  # of the draft, where the drift signal is its first step


class TokenTrimPipeline(AnyFlowFARPipeline):
    r"""
    Long video from causal (chunk by chunk) Wan models, with a rolling KV cache that TokenTrim
    ([arXiv 2602.00268](https://huggingface.co/papers/2602.00268)) keeps clean: when a chunk has drifted abnormally far
    from the one before it, its most changed tokens leave the cache and the chunk is generated again.

    The rollout settings after `scheduler` are defaults of the call that travel with a checkpoint, in its
    `model_index.json`. This model inherits from [`AnyFlowFARPipeline`]; check it for prompts, LoRA and video encoding.

    Args:
        tokenizer ([`AutoTokenizer`]): tokenizer; `None` where prompts come as `prompt_embeds`.
        text_encoder ([`UMT5EncoderModel`]): text encoder; `None` where prompts come as `prompt_embeds`.
        transformer ([`WanTransformer3DModel`] or [`AnyFlowFARTransformer3DModel`]): chunk-causal video transformer.
        vae ([`AutoencoderKLWan`]): video VAE; `None` where latents come out.
        scheduler ([`SchedulerMixin`]): any flow-matching scheduler; one without [`TokenTrimSchedulerMixin`] is lifted.
        rollout (`str`, *optional*): `"self_forcing"` or `"rolling_forcing"`.
        num_frames_per_chunk (`int`, *optional*): latent frames of a chunk.
        window_size (`int`, *optional*): latent frames that attention spans, the current chunk and the sink included.
        num_sink_frames (`int`, *optional*): first latent frames that never leave the cache.
        relative_positions (`bool`, *optional*): count positions inside the window.
        num_inference_steps (`int`, *optional*): denoising steps of a chunk.
        height (`int`, *optional*): height of the video in pixels.
        width (`int`, *optional*): width of the video in pixels.
        max_sequence_length (`int`, *optional*): tokens that a prompt is padded to.
    """

    _optional_components = ["tokenizer", "text_encoder", "vae"]

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        transformer: AnyFlowFARTransformer3DModel | WanTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMapEulerDiscreteScheduler,
        rollout: str | None = None,
        num_frames_per_chunk: int | None = None,
        window_size: int | None = None,
        num_sink_frames: int | None = None,
        relative_positions: bool | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
    ):
        is_wan = vae is None or "scale_factor_temporal" in vae.config
        check(is_wan, "vae", type(vae).__name__, "an AutoencoderKLWan, from a causal Wan checkpoint")
        scheduler = lift_scheduler(scheduler) if scheduler is not None else None
        super().__init__(tokenizer, text_encoder, transformer, vae, scheduler)
        self.register_to_config(
            rollout=rollout,
            num_frames_per_chunk=num_frames_per_chunk,
            window_size=window_size,
            num_sink_frames=num_sink_frames,
            relative_positions=relative_positions,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            max_sequence_length=max_sequence_length,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, include_code: bool = False, **kwargs) -> None:
        """
        Save all components, and the settings of the rollout.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            include_code (`bool`, defaults to `False`):
                Whether to save the code of the pipeline as well, so that `trust_remote_code=True` is all that somebody
                without this project needs to load the folder; without that, it does not load. A folder that holds the
                code already stays such a folder.
            args, kwargs (*optional*): as in [`DiffusionPipeline.save_pretrained`].
        """
        if include_code:
            copy_code(Path(__file__), save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Write `model_index.json`. Where the folder holds no code, it names the stock Diffusers classes, since ours would
        load nowhere; the stock scheduler is lifted again when the folder is loaded here.

        Args:
            save_directory (`str` or `os.PathLike`): the checkpoint's folder.
        """
        super().save_config(save_directory, **kwargs)
        name_stock_classes(save_directory, self.scheduler)
        if (Path(save_directory) / Path(__file__).name).is_file():
            name_our_classes(save_directory, Path(__file__))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        video: torch.Tensor | None = None,
        video_latents: torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int | None = None,
        use_mean_velocity: bool = True,
        use_kv_cache: bool = True,
        chunk_partition: list[int] | None = None,
        token_trim: bool = True,
        prune_fraction: float = 0.1,
        drift_sensitivity: float = 2.0,
        warmup_chunks: int = 2,
        max_regenerations: int = 1,
        drift_signal: str = "final",
        flowmo_iterations: int = 0,
        flowmo_learning_rate: float = 0.005,
        flowmo_steps: list[int] | None = None,
        flowmo_chunks: str = "first",
        reanchor: str | None = None,
        reanchor_tolerance: float | None = None,
        reanchor_patience: int = 6,
        quarantine_sensitivity: float | None = None,
        rollout: str | None = None,
        num_frames_per_chunk: int | None = None,
        window_size: int | None = None,
        num_sink_frames: int | None = None,
        relative_positions: bool | None = None,
        protect_conditioning: bool = True,
        pad_keys: bool = True,
        renoise: Callable[[int, int], torch.Tensor] | None = None,
        on_chunk: Callable[[int, torch.Tensor, list[dict]], None] | None = None,
    ) -> TokenTrimPipelineOutput | tuple:
        r"""
        Generate long videos.

        Every argument of [`AnyFlowFARPipeline.__call__`] means what it means there, but for the defaults that the
        checkpoint sets. The arguments of the method, of the rollout and of the schedule:

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompt or prompts; or pass `prompt_embeds`.
            video (`torch.Tensor`, *optional*):
                Frames to continue, (B, T, C, H, W) in `[0, 1]` with T = 4n + 1. Their latent frames fill whole chunks.
            video_latents (`torch.Tensor`, *optional*): the same as latents, (B, T, C, H, W).
            negative_prompt (`str` or `list[str]`, *optional*): what to avoid, with `guidance_scale` above 1.
            height (`int`, *optional*, defaults to `480`): height of the video in pixels.
            width (`int`, *optional*, defaults to `832`): width of the video in pixels.
            num_frames (`int`, *optional*, defaults to `81`):
                Frames of the video. Its latent frames, (num_frames - 1) / temporal factor + 1, are whole chunks; with
                AnyFlow-FAR the last one is what is left.
            num_inference_steps (`int`, *optional*, defaults to `4`): denoising steps of each chunk.
            sigmas (`list[float]`, *optional*):
                Noise levels, falling from 1; the scheduler's shift is applied on top. By default
                linspace(1, 0, S + 1)[:-1] for S steps, whatever the scheduler's own spacing.
            timesteps (`list[float]`, *optional*): the same as timesteps, as the scheduler understands them.
            guidance_scale (`float`, defaults to `1.0`): classifier-free guidance above 1; one eviction serves both
                branches.
            num_videos_per_prompt (`int`, defaults to `1`): videos of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Random numbers. With a list, one for each video, a batch equals single runs.
            latents (`torch.Tensor`, *optional*): initial noise of all chunks, (B, C, T, H, W).
            prompt_embeds (`torch.Tensor`, *optional*): text embeddings, (B, text, dim), padding rows included.
            negative_prompt_embeds (`torch.Tensor`, *optional*): the same for `negative_prompt`.
            output_type (`str`, defaults to `"np"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): whether to return an output object instead of a tuple.
            attention_kwargs (`dict`, *optional*): passed on to the transformer, such as a LoRA scale.
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step, those of regenerations included (there, `latents` are those of the
                videos generated again), as in every Diffusers pipeline.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): what it is given.
            max_sequence_length (`int`, *optional*, defaults to `512`): tokens that a prompt is padded to.
            use_mean_velocity (`bool`, defaults to `True`):
                AnyFlow-FAR alone: whether the model is told where a step goes, not only where it is.
            use_kv_cache (`bool`, defaults to `True`): has to be `True`.
            chunk_partition (`list[int]`, *optional*):
                Latent frames of each chunk, instead of `num_frames_per_chunk`. By default of AnyFlow-FAR the model's
                own; for another length its first chunk, and then as many of its second as there is room for.
            token_trim (`bool`, defaults to `True`):
                Whether to trim. `False` is the same loop with the gate shut: severities are still reported.
            prune_fraction (`float`, defaults to `0.1`): p, the share of the token grid that counts as unstable.
            drift_sensitivity (`float`, defaults to `2.0`):
                lambda: severities above mean + lambda * standard deviation of the accepted ones are abnormal.
            warmup_chunks (`int`, defaults to `2`): accepted severities before the gate opens.
            max_regenerations (`int`, defaults to `1`): attempts at a chunk after the first.
            drift_signal (`str`, defaults to `"final"`):
                What the gate compares: `"final"`, finished chunks; `"first_step"`, the x0 predictions of their first
                denoising step, so that another attempt costs one step instead of all.
            flowmo_iterations (`int`, defaults to `0`):
                FlowMo ([arXiv 2506.01144](https://huggingface.co/papers/2506.01144)): gradient steps on the latents
                before a denoising step, towards an x0 prediction that moves evenly. 0 is off, 1 the paper's.
            flowmo_learning_rate (`float`, defaults to `0.005`): size of a gradient step.
            flowmo_steps (`list[int]`, *optional*):
                Indices of the denoising steps that it guides. By default the first quarter of them, rounded up (12 of
                50 in its paper).
            flowmo_chunks (`str`, defaults to `"first"`):
                `"first"`, the first generated chunk, TokenTrim's motion-stabilised initialisation; or `"all"`.
            reanchor (`str`, *optional*):
                Ours, not the paper's: which statistics of each latent channel of an accepted chunk are moved to the
                first chunk's before it becomes context: `"mean"`, `"moments"` (mean and standard deviation),
                `"histogram"` (all values, by rank) or `"distribution"` (all values, of all channels jointly). What is
                shown stays as generated. A given video is held to its last chunk, and not changed. `None` is off.
            reanchor_tolerance (`float`, *optional*):
                For videos that are meant to change: how far from the first chunk, in standard deviations of the latent
                channels' means, is meant. A video is then watched before it is held; a chunk that goes farther stands
                in the place of the first one; and a held video whose median chunk goes farther is let go again.
                `None`: every chunk is held, unless a callback changes the prompt.
            reanchor_patience (`int`, defaults to `6`):
                Chunks that a video is watched before it is held or let go.
            quarantine_sensitivity (`float`, *optional*):
                Ours, not the paper's: a chunk whose latent values, wherever they are, jump by more than mean + this *
                standard deviation of the video's jumps is shown, but no later chunk reads it; never two in a row, so
                that what stays is let in. `None` is off.
            rollout (`str`, *optional*, defaults to `"self_forcing"`):
                `"self_forcing"`: chunk after chunk, each through all its steps. `"rolling_forcing"`: a window of as
                many chunks as there are steps, denoised together, each a step behind the chunk before it; with a
                sink directly before the recent frames, which only the denoising reads, not the context pass.
            num_frames_per_chunk (`int`, *optional*, defaults to `3`):
                Latent frames of a chunk; with AnyFlow-FAR of all but the first, by default as the model's own.
            window_size (`int`, *optional*):
                Latent frames that attention spans, the current chunk and the sink included. `None` without a setting
                in the checkpoint: all of the past, whose cache grows without bound.
            num_sink_frames (`int`, *optional*):
                First latent frames that never leave the cache. `None` without a setting in the checkpoint: 0, or the
                first chunk with `"rolling_forcing"`.
            relative_positions (`bool`, *optional*):
                Count positions inside the window, the sink directly before the recent frames. `None` without a
                setting in the checkpoint: only with `"rolling_forcing"`.
            protect_conditioning (`bool`, defaults to `True`):
                Whether the frames of `video` or `video_latents` are safe from eviction; the window drops them still.
            pad_keys (`bool`, defaults to `True`):
                AnyFlow-FAR alone: whether a chunk also attends to the zero keys that upstream's pipeline adds where
                its tokens are no multiple of 128. `False` is attention as the model was trained.
            renoise (`Callable`, *optional*):
                `renoise(chunk, step)` gives the noise, (B, C, frames of the chunk, H, W), that re-noises chunk `chunk`
                after its step `step`, for schedulers that re-noise. By default drawn from `generator`, the same
                whether or not anything was regenerated.
            on_chunk (`Callable`, *optional*):
                `on_chunk(index, latents, decisions)`, called once for each accepted chunk with its latents,
                (B, C, frames, H, W), and its decisions, one for each video.

        Returns:
            [`TokenTrimPipelineOutput`] or `tuple`: with `return_dict=False`, `(frames, decisions)`.

        Raises:
            `TypeError`, `ValueError`: an argument is no good; its name, its value and what is valid are in the message.
            `RuntimeError`: the model's output is not finite; chunk and step are in the message.
        """
        # 1. Take what was not given from the checkpoint, and check everything before any model runs
        check_number("guidance_scale", guidance_scale, lambda scale: scale >= 0, "a finite number >= 0")
        encodes_text = prompt is not None or (guidance_scale > 1.0 and negative_prompt_embeds is None)
        check_components(self, encodes_text, video is not None, output_type)
        spatial, temporal = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        if latents is not None:
            check_tensor("latents", latents, 5, "(batch, channels, latent frames, height, width)")
            height = latents.shape[3] * spatial if height is None else height
            width = latents.shape[4] * spatial if width is None else width
            num_frames = (latents.shape[2] - 1) * temporal + 1 if num_frames is None else num_frames
        rollout = self._setting("rollout", rollout, "self_forcing")
        check_choice("rollout", rollout, ROLLOUTS)
        rolling = rollout == "rolling_forcing"
        config = self.transformer.config
        full_chunk_limit = config.get("full_chunk_limit", 1)  # of AnyFlow-FAR alone
        far = full_chunk_limit > 1
        num_frames_per_chunk = self._setting("num_frames_per_chunk", num_frames_per_chunk, None if far else 3)
        window_size = self._setting("window_size", window_size, None)
        num_sink_frames = self._setting("num_sink_frames", num_sink_frames, None)
        relative_positions = self._setting("relative_positions", relative_positions, rolling)
        num_inference_steps = self._setting("num_inference_steps", num_inference_steps, 4)
        height, width = self._setting("height", height, 480), self._setting("width", width, 832)
        max_sequence_length = self._setting("max_sequence_length", max_sequence_length, 512)
        num_frames = 81 if num_frames is None else num_frames
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        valid = "a list of names of tensors"
        check_list("callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs, str, valid)
        check_attention_kwargs(attention_kwargs)
        patch_size = config.patch_size
        check_sizes(height, width, spatial, patch_size, max_sequence_length, num_videos_per_prompt)
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        check_prompt_embeds(prompt_embeds, negative_prompt_embeds, config.text_dim)
        batch_size = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else prompt_embeds)
        check_prompts(prompt, negative_prompt, batch_size)
        num_videos = batch_size * num_videos_per_prompt
        chunk_partition = partition_chunks(
            num_frames, temporal, num_frames_per_chunk, chunk_partition, config.get("chunk_partition")
        )
        if far:
            check_compression(height, width, spatial, config, len(chunk_partition))
        num_channels = config.in_channels
        shape = (num_videos, num_channels, sum(chunk_partition), height // spatial, width // spatial)
        check_draws(generator, latents, shape)
        num_given_chunks = count_given_chunks(video, video_latents, spatial, temporal, shape, chunk_partition)
        check_schedule(self.scheduler, num_inference_steps, sigmas, timesteps, renoise)
        check_method(token_trim, prune_fraction, drift_sensitivity, warmup_chunks, max_regenerations, drift_signal)
        check_rollout(rollout, self.scheduler, drift_signal, full_chunk_limit)
        check_bool("use_mean_velocity", use_mean_velocity)
        check_bool("protect_conditioning", protect_conditioning)
        check_bool("pad_keys", pad_keys)
        guided_chunks = range(num_given_chunks, len(chunk_partition))[: 1 if flowmo_chunks == "first" else None]
        check_flowmo(
            flowmo_iterations,
            flowmo_learning_rate,
            flowmo_steps,
            flowmo_chunks,
            min(chunk_partition[chunk] for chunk in guided_chunks),
            drift_signal,
        )
        check_reanchor(reanchor, reanchor_tolerance, reanchor_patience)
        check_callables(callback_on_step_end=callback_on_step_end, on_chunk=on_chunk)
        device = self._execution_device
        self.scheduler.set_rollout_timesteps(num_inference_steps, device, sigmas, timesteps)
        num_steps = len(self.scheduler.timesteps)
        num_window_chunks = num_steps if rolling else 1
        if flowmo_steps is None:
            flowmo_steps = range(-(-num_steps // 4))
        flowmo = _FlowMo(
            guided_chunks if flowmo_iterations else (), flowmo_steps, flowmo_iterations, flowmo_learning_rate
        )
        if num_sink_frames is None:
            num_sink_frames = chunk_partition[0] if rolling else 0
        check_context(
            window_size,
            num_sink_frames,
            relative_positions,
            chunk_partition,
            num_window_chunks,
            full_chunk_limit,
            use_kv_cache,
        )
        check_quarantine(quarantine_sensitivity, window_size, num_sink_frames, chunk_partition, num_window_chunks)
        renoise = _Renoise(renoise, generator, shape, chunk_partition, num_window_chunks, device)
        if renoise.given is not None and num_steps > 1:
            renoise(num_given_chunks, 0)
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        num_chunks = len(chunk_partition) - num_given_chunks
        self._num_timesteps = num_chunks - 1 + num_steps if rolling else num_chunks * num_steps

        # 2. Encode the prompt
        given_embeds = prompt_embeds is not None, negative_prompt_embeds is not None
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        prompt_embeds, negative_prompt_embeds = (
            embeds.repeat_interleave(num_videos_per_prompt, dim=0) if given and embeds is not None else embeds
            for given, embeds in zip(given_embeds, (prompt_embeds, negative_prompt_embeds))
        )

        # 3. Prepare the noise of all chunks, and the latents of the frames to continue
        initial_noise = self.prepare_latents(
            num_videos, num_channels, height, width, num_frames, torch.float32, device, generator, latents
        )
        noise_chunks = initial_noise.split(chunk_partition, dim=2)  # each (B, C, frames of the chunk, H, W)
        if video is not None:
            video_latents = self.encode_whole_video(video, height, width)
        given_chunks = []
        if video_latents is not None:
            given = video_latents.to(device, torch.float32).transpose(1, 2)  # (B, C, T, H, W)
            given = given.repeat_interleave(num_videos // len(given), dim=0)
            given_chunks = given.split(chunk_partition[:num_given_chunks], dim=2)

        # 4. Roll out chunk by chunk
        context = {
            "grid": token_grid(initial_noise, patch_size),
            "num_videos": num_videos,
            "window_size": window_size,
            "num_sink_frames": num_sink_frames,
            "relative_positions": relative_positions,
            "num_protected_frames": sum(chunk_partition[:num_given_chunks]) if protect_conditioning else 0,
        }
        if far:
            backbone = FARBackbone(self.transformer, use_mean_velocity, pad_keys, **context)
        else:
            backbone = WanBackbone(self.transformer, sink_in_context_pass=not rolling, **context)
        policy = TokenTrimPolicy(
            patch_size,
            num_videos,
            prune_fraction,
            drift_sensitivity,
            warmup_chunks if token_trim else math.inf,
            max_regenerations,
        )
        state = _RolloutState(
            list(noise_chunks),
            num_window_chunks,
            flowmo,
            Quarantine(num_videos, quarantine_sensitivity),
            Anchor(reanchor, reanchor_tolerance, reanchor_patience),
            backbone,
            backbone.cache,
            renoise,
            self._solver_generators(generator, num_videos),
            drift_signal,
            prompt_embeds,
            negative_prompt_embeds if self.do_classifier_free_guidance else None,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            on_chunk,
        )
        with backbone.attached(), self.progress_bar(total=self.num_timesteps) as state.progress:
            latents, decisions = self.roll_out(state, policy, given_chunks)

        # 5. Decode
        frames = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames, decisions)
        chunk_frames = [num * temporal for num in chunk_partition]
        chunk_frames[0] -= temporal - 1  # the first latent frame is one frame
        return TokenTrimPipelineOutput(
            frames, decisions, backbone.cache.grid, None if output_type == "latent" else chunk_frames
        )

    def roll_out(
        self, state: _RolloutState, policy: TokenTrimPolicy, given_chunks: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[list[dict]]]:
        """Algorithm 1, chunk by chunk: latents (B, C, T, H, W) and `decisions[video][chunk]`. A rollout without
        trimming is the same loop with the gate shut."""
        chunks, decisions, previous, draft = [], [[] for _ in policy.gates], None, None
        for index, noise in enumerate(state.noise_chunks):
            if self.interrupt:
                break
            state.cache.begin_chunk(noise.shape[2])
            if index < len(given_chunks):
                chunk = given_chunks[index]
                draft = chunk if state.drift_signal == "final" else None
            else:
                self.scheduler.begin_chunk(state.solver_generators)
                draft = self.draft_chunk(state, index)
                while condemned := policy.review(previous, draft):  # eq. 4 to 8, at most R times
                    state.cache.evict(condemned)  # eq. 9, 10
                    draft = self.redraft_chunk(state, index, draft, list(condemned))
                chunk = self.finish_chunk(state, index)
            chunks.append(chunk)
            if self.interrupt:
                break
            broken = self.commit_chunk(state, index, chunk, given=index < len(given_chunks))
            previous = without(broken, draft, previous)
            judged = [vars(decision) for decision in policy.accept(broken)]
            for of_video, decision in zip(decisions, judged):
                of_video.append(decision)
            if state.on_chunk is not None and index >= len(given_chunks):
                state.on_chunk(index, chunk, judged)
        return torch.cat(chunks, dim=2), decisions

    def draft_chunk(self, state: _RolloutState, index: int) -> torch.Tensor:
        """What the gate looks at, (B, C, frames, H, W): the finished chunk, or its first x0 prediction."""
        if state.drift_signal == "first_step":
            window = [_InFlight(state.noise_chunks[index])]
            self.guide_motion(state, index, window)
            state.noise_chunks[index] = window[0].latents
            state.first_flow = self.predict_flow(state, index, window)
            return self.scheduler.predict_original_sample(state.first_flow, window[0].latents)
        state.attempt = self.denoise_window(state, index)
        return state.attempt[0].latents

    def redraft_chunk(self, state: _RolloutState, index: int, draft: torch.Tensor, videos: list[int]) -> torch.Tensor:
        """The draft with some videos generated again from the same noise, on the context as it is now."""
        if self.interrupt:
            return draft
        draft = draft.clone()
        with state.cache.only(videos):
            if state.drift_signal == "first_step":
                noise = state.noise_chunks[index][videos]
                flow = self.predict_flow(state, index, [_InFlight(noise)], videos)
                state.first_flow[videos] = flow
                draft[videos] = self.scheduler.predict_original_sample(flow, noise)
                return draft
            state.progress.total += len(self.scheduler.timesteps) - (state.window[0].step if state.window else 0)
            for kept, again in zip(state.attempt, self.denoise_window(state, index, videos)):
                kept.latents = kept.latents.clone()
                kept.latents[videos] = again.latents
        return state.attempt[0].latents

    def finish_chunk(self, state: _RolloutState, index: int) -> torch.Tensor:
        """From the accepted draft to the finished chunk; the chunks behind it fly on."""
        if state.drift_signal == "first_step":
            state.attempt = self.denoise_window(state, index, first_flow=state.first_flow)
        finished, *state.window = state.attempt
        return finished.latents

    def denoise_window(
        self,
        state: _RolloutState,
        index: int,
        videos: list[int] | None = None,
        first_flow: torch.Tensor | None = None,
    ) -> list[_InFlight]:
        """Denoise all chunks of the window together, step by step, until chunk `index`, its first, is finished."""
        self.scheduler.rewind(videos)
        timesteps = self.scheduler.timesteps
        window = [
            _InFlight(chunk.latents if videos is None else chunk.latents[videos], chunk.step) for chunk in state.window
        ]
        flow = first_flow
        while not window or window[0].step < len(timesteps):
            if len(window) < state.num_window_chunks and index + len(window) < len(state.noise_chunks):
                noise = state.noise_chunks[index + len(window)]
                window.append(_InFlight(noise if videos is None else noise[videos]))
            if self.interrupt:
                break
            if flow is None:
                self.guide_motion(state, index, window, videos)
                flow = self.predict_flow(state, index, window, videos)
            sizes = [chunk.latents.shape[2] for chunk in window]
            step, flows, flow = window[0].step, flow.split(sizes, dim=2), None
            for number, (chunk, flow_of_chunk) in enumerate(zip(window, flows), start=index):
                self.step_chunk(state, number, chunk, flow_of_chunk, videos)
            if state.callback is not None:
                latents = torch.cat([chunk.latents for chunk in window], dim=2)
                latents = self._call_back(state, step, timesteps[step], latents)
                for chunk, changed in zip(window, latents.split(sizes, dim=2)):
                    chunk.latents = changed
            state.progress.update()
        return window

    def guide_motion(
        self, state: _RolloutState, index: int, window: list[_InFlight], videos: list[int] | None = None
    ) -> None:
        """FlowMo, where it was asked for: change the latents of chunks in the window, of which `index` is the first."""
        flowmo, sizes = state.flowmo, [chunk.latents.shape[2] for chunk in window]
        for offset, chunk in enumerate(window):
            if index + offset not in flowmo.chunks or chunk.step not in flowmo.steps:
                continue
            if state.num_window_chunks > 1:
                self.scheduler.seek(chunk.step)

            def predict_x0(latents, offset=offset, step=chunk.step):
                guided = [*window[:offset], _InFlight(latents, step), *window[offset + 1 :]]
                flow = self.predict_flow(state, index, guided, videos).split(sizes, dim=2)[offset]
                return self.scheduler.predict_original_sample(flow, latents)

            with checkpointed(self.transformer):
                chunk.latents = guide(chunk.latents, predict_x0, flowmo.iterations, flowmo.learning_rate)

    def step_chunk(
        self, state: _RolloutState, index: int, chunk: _InFlight, flow: torch.Tensor, videos: list[int] | None
    ) -> None:
        """One scheduler step of one chunk of the window."""
        timesteps = self.scheduler.timesteps
        version = state.cache.version
        if state.num_window_chunks > 1:
            self.scheduler.seek(chunk.step)
        eps = None
        if self.scheduler.renoises and chunk.step + 1 < len(timesteps):
            eps = state.renoise(index, chunk.step)
            eps = eps if videos is None else eps[videos]
        chunk.latents, _ = self.scheduler.step(
            flow, timesteps[chunk.step], chunk.latents, noise=eps, context_version=version, return_dict=False
        )
        chunk.step += 1

    def commit_chunk(self, state: _RolloutState, index: int, chunk: torch.Tensor, given: bool) -> set[int]:
        """Context pass: the clean chunk's keys and values enter the cache; nothing else stays.

        Returns the videos whose chunk is quarantined: their keys and values are gone again.
        """
        if index + 1 == len(state.noise_chunks):
            return set()
        broken, context = set(), chunk
        if given:
            state.quarantine.trust(chunk)
            state.anchor.start(chunk)
        else:
            broken = state.quarantine.judge(chunk)
            context = state.anchor.hold(chunk, broken)
        outcome = state.backbone.commit(*self._branches(state, context), self.attention_kwargs)
        self._check_finite(outcome, index, "the context pass")
        if broken:
            every_token = range(state.cache.tokens_per_frame)
            state.cache.evict(dict.fromkeys(broken, every_token), since_frame=state.cache.next_frame - chunk.shape[2])
        return broken

    def predict_flow(
        self, state: _RolloutState, index: int, window: list[_InFlight], videos: list[int] | None = None
    ) -> torch.Tensor:
        """The transformer's flow prediction in fp32, guided where asked, (B or len(videos), C, frames, H, W)."""
        sizes = [chunk.latents.shape[2] for chunk in window]
        steps = torch.tensor([chunk.step for chunk in window])
        levels = F.pad(self.scheduler.timesteps, (0, 1))
        latents, text = self._branches(state, torch.cat([chunk.latents for chunk in window], dim=2), videos)
        flow = state.backbone.predict_flow(
            latents, sizes, levels[steps], levels[steps + 1], text, self.attention_kwargs
        ).float()
        self._check_finite(flow, index, f"step {window[0].step}")
        if state.negative_prompt_embeds is None:
            return flow
        unconditional, conditional = flow.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _branches(
        self, state: _RolloutState, latents: torch.Tensor, videos: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of latents and of text: with guidance the unconditional ones first."""
        embeds = [state.negative_prompt_embeds, state.prompt_embeds]
        embeds = [each if videos is None else each[videos] for each in embeds if each is not None]
        return torch.cat([latents] * len(embeds)), torch.cat(embeds)

    @staticmethod
    def _check_finite(outcome: torch.Tensor, index: int, place: str) -> None:
        if not torch.isfinite(outcome).all():
            raise RuntimeError(f"The transformer's output is not finite (NaN or Inf) in chunk {index}, {place}.")

    def encode_whole_video(self, video: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`encode_video` for any length: the VAE goes by 1 + 4n frames and drops a rest, so a rest is padded for it."""
        num_latent_frames = (video.shape[1] - 1) // self.vae_scale_factor_temporal + 1
        padding = video[:, -1:].expand(-1, (1 - video.shape[1]) % 4, -1, -1, -1)  # never seen by the frames before
        return self.encode_video(torch.cat([video, padding], dim=1), height, width)[:, :num_latent_frames]

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list:
        """Latents (B, C, T, H, W) to videos as `output_type` asks."""
        config = self.vae.config
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        latents = (latents * std.to(latents) + mean.to(latents)).to(self.vae.dtype)
        video = self.vae.decode(latents, return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)

    def _setting(self, name: str, value: Any, fallback: Any) -> Any:
        """An argument of the call, else the checkpoint's setting, else ours."""
        if value is None:
            value = self.config.get(name)
        return fallback if value is None else value

    def _solver_generators(self, generator, num_videos: int) -> list[torch.Generator] | None:
        """One generator for each video, for schedulers that draw inside `step`: some videos may have to replay."""
        if not self.scheduler.draws_inside or isinstance(generator, list):
            return generator if self.scheduler.draws_inside else None
        device = generator.device if generator is not None else None
        seeds = torch.randint(2**62, (num_videos,), generator=generator, device=device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]

    def _call_back(
        self, state: _RolloutState, step: int, timestep: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """`callback_on_step_end`: it may change the latents and the prompt."""
        tensors = {
            "latents": latents,
            "prompt_embeds": state.prompt_embeds,
            "negative_prompt_embeds": state.negative_prompt_embeds,
        }
        outputs = state.callback(self, step, timestep, {name: tensors[name] for name in state.callback_tensor_inputs})
        check_callback_outputs(outputs, latents)
        tensors.update(outputs)
        prompt = (state.prompt_embeds, state.negative_prompt_embeds)
        state.prompt_embeds, state.negative_prompt_embeds = tensors["prompt_embeds"], tensors["negative_prompt_embeds"]
        if prompt[0] is not state.prompt_embeds or prompt[1] is not state.negative_prompt_embeds:
            state.cache.forget_prompt()
            state.anchor.let_go()
        return tensors["latents"]
