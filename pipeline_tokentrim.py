# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim (arXiv 2602.00268) for causal video diffusion models in Diffusers: the pipeline."""

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
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

from .tokentrim_attention import WanBackbone  # noqa: F401
from .tokentrim_cache import RollingKVCache  # noqa: F401
from .tokentrim_checks import check
from .tokentrim_context import ContextPolicy
from .tokentrim_denoising import Prompt
from .tokentrim_far import FARBackbone  # noqa: F401
from .tokentrim_flowmo import FlowMo  # noqa: F401
from .tokentrim_layout import Layout, View
from .tokentrim_methods import make_method  # noqa: F401
from .tokentrim_output import TokenTrimPipelineOutput
from .tokentrim_plan import RolloutPlan, plan_rollout
from .tokentrim_policy import TokenTrim  # noqa: F401
from .tokentrim_quarantine import Quarantine  # noqa: F401
from .tokentrim_reanchor import Reanchor  # noqa: F401
from .tokentrim_rollout import Rollout
from .tokentrim_saving import copy_code, name_our_classes, name_stock_classes
from .tokentrim_scheduler import lift_scheduler
from .tokentrim_stability import token_grid  # noqa: F401
from .tokentrim_statistics import quantiles  # noqa: F401


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: its index, latents (B, C, frames, H, W), and one decision for each video."""

    index: int
    latents: torch.Tensor
    decisions: list[dict]


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

    # What a method of one's own is made of: `class Mine(pipe.ContextPolicy)`, `class Mine(pipe.Layout)`.
    ContextPolicy, Layout, View = ContextPolicy, Layout, View

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
        method: str | dict | list | ContextPolicy = "tokentrim",
        prune_fraction: float | None = None,
        drift_sensitivity: float | None = None,
        warmup_chunks: int | None = None,
        max_regenerations: int | None = None,
        drift_signal: str | None = None,
        rollout: str | None = None,
        num_frames_per_chunk: int | None = None,
        layout: str | dict | Layout | None = None,
        window_size: int | None = None,
        num_sink_frames: int | None = None,
        relative_positions: bool | None = None,
        sink_at_commit: bool | None = None,
        protect_conditioning: bool = True,
        pad_keys: bool = True,
        renoise: Callable[[int, int], torch.Tensor] | None = None,
        on_chunk: Callable[[int, torch.Tensor, list[dict]], None] | None = None,
    ) -> TokenTrimPipelineOutput | tuple:
        r"""
        Generate long videos.

        Arguments that are not listed mean what they mean in [`AnyFlowFARPipeline.__call__`].

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompt or prompts; or pass `prompt_embeds`.
            video (`torch.Tensor`, *optional*):
                Frames to continue, (B, T, C, H, W) in `[0, 1]` with T = 4n + 1. Their latent frames fill whole chunks.
            video_latents (`torch.Tensor`, *optional*): the same as latents, (B, T, C, H, W).
            height, width (`int`, *optional*, default to `480`, `832`): size of the video in pixels.
            num_frames (`int`, *optional*, defaults to `81`):
                Frames of the video. Its latent frames, (num_frames - 1) / temporal factor + 1, are whole chunks; with
                AnyFlow-FAR the last one is what is left.
            num_inference_steps (`int`, *optional*, defaults to `4`): denoising steps of each chunk.
            sigmas (`list[float]`, *optional*):
                Noise levels, falling from 1; the scheduler's shift is applied on top. By default
                linspace(1, 0, S + 1)[:-1] for S steps, whatever the scheduler's own spacing.
            timesteps (`list[float]`, *optional*): the same as timesteps, as the scheduler understands them.
            guidance_scale (`float`, defaults to `1.0`):
                Classifier-free guidance above 1; one eviction serves both branches.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Random numbers. With a list, one for each video, a batch equals single runs.
            latents (`torch.Tensor`, *optional*): initial noise of all chunks, (B, C, T, H, W).
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*):
                Text embeddings, (B, text, dim), padding rows included.
            output_type (`str`, defaults to `"np"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step, those of regenerations included (there, `latents` are those of the
                videos generated again), as in every Diffusers pipeline.
            max_sequence_length (`int`, *optional*, defaults to `512`): tokens that a prompt is padded to.
            use_mean_velocity (`bool`, defaults to `True`):
                AnyFlow-FAR alone: whether the model is told where a step goes, not only where it is.
            chunk_partition (`list[int]`, *optional*):
                Latent frames of each chunk, instead of `num_frames_per_chunk`. By default of AnyFlow-FAR the model's
                own; for another length its first chunk, and then as many of its second as there is room for.
            method (`str`, `dict`, `list` or `ContextPolicy`, defaults to `"tokentrim"`):
                What is done against drift. `"plain"`: nothing. `"tokentrim"`: algorithm 1 of the paper. `"paper"`: the
                same after FlowMo's motion-stabilised initialisation (its section 4.1). `"tokentrim_plus"`, ours:
                quarantine and re-anchoring. Or policies by name with their settings, in chain order:
                `{"quarantine": {"sensitivity": 6}, "reanchor": {"match": "distribution"}}`. Or an object with the verbs
                of `pipe.ContextPolicy`, which is copied for each video. Or a list of these.
            prune_fraction, drift_sensitivity, warmup_chunks, max_regenerations, drift_signal (*optional*):
                Settings of TokenTrim, see [`TokenTrim`]: by default 0.1, 2.0, 2, 1 and `"final"`.
            rollout (`str`, *optional*, defaults to `"self_forcing"`):
                `"self_forcing"`: chunk after chunk, each through all its steps. `"rolling_forcing"`: as many chunks in
                flight as there are steps, denoised together, each a step behind the chunk before it.
            num_frames_per_chunk (`int`, *optional*, defaults to `3`):
                Latent frames of a chunk; with AnyFlow-FAR of all but the first, by default as the model's own.
            layout (`str`, `dict` or `Layout`, *optional*):
                Which past frames a pass reads, and where they stand: a name, a dict of it with its settings, or an
                object with the functions of `pipe.Layout`. By default a window, from the next four arguments.
            window_size (`int`, *optional*):
                Latent frames that attention spans, the current chunk and the sink included. `None` without a setting
                in the checkpoint: all of the past, whose cache grows without bound.
            num_sink_frames (`int`, *optional*):
                First latent frames that never leave the cache. `None` without a setting in the checkpoint: 0, or the
                first chunk with `"rolling_forcing"`.
            relative_positions (`bool`, *optional*):
                Count positions inside the window, the sink directly before the recent frames. `None` without a
                setting in the checkpoint: only with `"rolling_forcing"`.
            sink_at_commit (`bool`, *optional*):
                Whether a commit reads the sink as well. `None`: not with `"rolling_forcing"`.
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
                `on_chunk(index, latents, decisions)`, called once for each generated chunk with copies of its latents,
                (B, C, frames, H, W), and its decisions, one for each video.

        Returns:
            [`TokenTrimPipelineOutput`] or `tuple`: with `return_dict=False`, `(frames, decisions)`.

        Raises:
            `TypeError`, `ValueError`: an argument is no good; its name, its value and what is valid are in the message.
            `RuntimeError`: the model's output is not finite; chunk and step are in the message.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}

        # 1. Complete the arguments from the checkpoint, and check them before any model runs
        plan = self.plan(**arguments)

        # 2. Encode the prompt, draw the noise, and roll out chunk by chunk
        run, chunks = self.begin(plan), []
        for chunk in self.roll_out(run):
            chunks.append(chunk)
            if on_chunk is not None and chunk.index >= plan.num_given_chunks:
                on_chunk(chunk.index, chunk.latents.clone(), copy.deepcopy(chunk.decisions))

        # 3. Decode
        latents = torch.cat([chunk.latents for chunk in chunks] or [run.noise[0][:, :, :0]], dim=2)
        frames = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        decisions = [list(video_decisions) for video_decisions in zip(*(chunk.decisions for chunk in chunks))]
        decisions = decisions or [[] for _ in range(plan.num_videos)]
        if not return_dict:
            return (frames, decisions)
        chunk_frames = None if output_type == "latent" else plan.chunk_frames[: len(chunks)]
        return TokenTrimPipelineOutput(frames, decisions, run.backbone.cache.grid, chunk_frames)

    def plan(self, *args, **kwargs) -> RolloutPlan:
        """What a call with these arguments would do, completed from the checkpoint and checked; no model runs."""
        call = inspect.signature(self.__call__).bind(*args, **kwargs)
        call.apply_defaults()
        return plan_rollout(self, call.arguments)

    @torch.no_grad()
    def roll_out(self, run: Rollout) -> Iterator[Chunk]:
        """Algorithm 1, chunk by chunk. The plain rollout is the same loop with policies that accept everything.

        Args:
            run ([`Rollout`]): from [`begin`], or one that was cut; the transformer is restored when the iterator ends or
                is closed.
        """
        with run.backbone.attached(), self.progress_bar(total=run.num_steps_left()) as run.denoiser.progress:
            for index in run.remaining():
                if self.interrupt:
                    return
                run.backbone.make_room(run.noise[index].shape[2])  # the layout says what may leave
                if index < len(run.given):  # frames to continue are read as they are, not judged
                    latents = context = run.given[index]
                    run.policies.observe(latents)
                else:
                    draft = run.denoiser.draft(index, run.in_flight)
                    while unstable := run.policies.review(draft.judged):  # eq. 4 to 8, at most R times
                        run.backbone.evict(unstable)  # eq. 9, 10: {video: grid tokens}
                        draft = run.denoiser.redraft(draft, list(unstable))
                    latents, run.in_flight = run.denoiser.finish(draft)
                    if self.interrupt:
                        return
                    context = run.policies.commit(latents) if run.goes_on(index) else latents
                if run.goes_on(index):
                    run.denoiser.commit(index, context, run.policies.entered)  # clean forward at t = 0
                run.index = index + 1  # from here on the run can be saved and resumed
                yield Chunk(index, latents, run.policies.close())

    def begin(self, plan: RolloutPlan) -> Rollout:
        """The session of a planned call: the schedule is set, the prompt encoded, the noise drawn; no step is taken."""
        call, device = plan.call, self._execution_device
        self.scheduler.set_rollout_timesteps(plan.num_inference_steps, device, plan.sigmas, plan.timesteps)
        self._guidance_scale = call["guidance_scale"]
        self._attention_kwargs = call["attention_kwargs"]
        self._interrupt = False
        self._num_timesteps = plan.count_steps(len(self.scheduler.timesteps))
        prompt = self._encode_prompts(plan, device)
        noise = self.prepare_latents(
            *plan.shape[:2],
            plan.height,
            plan.width,
            call["num_frames"],
            torch.float32,
            device,
            call["generator"],
            call["latents"],
        )
        return Rollout(self, plan, prompt, noise, self._given_latents(plan, device))

    def _encode_prompts(self, plan: RolloutPlan, device: torch.device) -> Prompt:
        call, repeats = plan.call, plan.call["num_videos_per_prompt"]
        names = ("prompt_embeds", "negative_prompt_embeds")
        encoded = self.encode_prompt(
            prompt=call["prompt"],
            negative_prompt=call["negative_prompt"],
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_videos_per_prompt=repeats,
            prompt_embeds=call["prompt_embeds"],
            negative_prompt_embeds=call["negative_prompt_embeds"],
            max_sequence_length=plan.max_sequence_length,
            device=device,
        )
        embeds, negative_embeds = (
            each if each is None or call[name] is None else each.repeat_interleave(repeats, dim=0)
            for name, each in zip(names, encoded)
        )
        return Prompt(embeds, negative_embeds if self.do_classifier_free_guidance else None)

    def _given_latents(self, plan: RolloutPlan, device: torch.device) -> torch.Tensor | None:
        """Latents of the frames to continue, (B, C, T, H, W)."""
        video, latents = plan.call["video"], plan.call["video_latents"]
        if video is not None:
            latents = self.encode_whole_video(video, plan.height, plan.width)
        if latents is None:
            return None
        latents = latents.to(device, torch.float32).transpose(1, 2)
        return latents.repeat_interleave(plan.num_videos // len(latents), dim=0)

    def encode_whole_video(self, video: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`encode_video` for any length: the VAE goes by 1 + 4n frames and drops a rest, so a rest is padded for it."""
        num_latent_frames = (video.shape[1] - 1) // self.vae_scale_factor_temporal + 1
        padding = video[:, -1:].expand(-1, (1 - video.shape[1]) % 4, -1, -1, -1)  # never seen by the frames before
        return self.encode_video(torch.cat([video, padding], dim=1), height, width)[:, :num_latent_frames]

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list:
        """Latents (B, C, T, H, W) to videos as `output_type` asks; none where a run was interrupted in its first chunk."""
        config = self.vae.config
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        latents = (latents * std.to(latents) + mean.to(latents)).to(self.vae.dtype)
        if latents.shape[2] > 0:
            video = self.vae.decode(latents, return_dict=False)[0]
        else:
            height, width = (side * self.vae_scale_factor_spatial for side in latents.shape[3:])
            video = latents.new_zeros(len(latents), 3, 0, height, width)
        return self.video_processor.postprocess_video(video, output_type=output_type)
