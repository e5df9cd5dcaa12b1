# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim (arXiv 2602.00268) for causal video diffusion models in Diffusers: the pipeline."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from transformers import AutoTokenizer, UMT5EncoderModel


try:
    from diffusers import (
        AnyFlowFARPipeline,
        AnyFlowFARTransformer3DModel,
        AutoencoderKLWan,
        FlowMapEulerDiscreteScheduler,
        SchedulerMixin,
        WanTransformer3DModel,
    )
except ImportError as error:
    from diffusers import __version__

    raise ImportError(
        f"TokenTrim needs diffusers 0.39.0 or newer, but {__version__} is here: `pip install -U diffusers`."
    ) from error

from .tokentrim_backbones.attention import check_free
from .tokentrim_backbones.backbone import Backbone
from .tokentrim_backbones.far import FARBackbone
from .tokentrim_backbones.hooks import check_hooks
from .tokentrim_backbones.parallel import check_parallel
from .tokentrim_backbones.registry import backbone_of
from .tokentrim_backbones.wan import rotary_dims
from .tokentrim_checks import check, check_int
from .tokentrim_files.bundle import bundle
from .tokentrim_files.checkpoint import (
    PIPELINE_FILE,
    SETTINGS,
    check_portable,
    name_our_classes,
    name_stock_classes,
    write_code,
)
from .tokentrim_files.run_state import (
    check_same,
    check_weights,
    has_state,
    keep_method,
    load_state,
    lock_state,
    recall,
    record_call,
    settings_of,
    whole_state,
)
from .tokentrim_frames.colors import color_drift
from .tokentrim_frames.comparison import Comparison
from .tokentrim_frames.decode import FrameDecoder, decode_all, make_decoder
from .tokentrim_frames.fragments import encode_chunk
from .tokentrim_frames.mp4 import FPS, VideoWriter
from .tokentrim_frames.output import TokenTrimPipelineOutput, concatenated
from .tokentrim_frames.pictures import as_rgb
from .tokentrim_frames.summary import tell_run
from .tokentrim_kv.book import take_tokens
from .tokentrim_kv.cache import RollingKVCache
from .tokentrim_kv.reading import Reading
from .tokentrim_kv.rewriting import LayerContext
from .tokentrim_kv.rows import BatchRows
from .tokentrim_kv.store import LayerStore
from .tokentrim_policies.chain import plain_state
from .tokentrim_policies.flowmo import FlowMo
from .tokentrim_policies.hook import DenoisingHook
from .tokentrim_policies.matching import MatchMean
from .tokentrim_policies.outliers import quantiles
from .tokentrim_policies.policy import ContextPolicy
from .tokentrim_policies.quarantine import Quarantine
from .tokentrim_policies.reanchor import Reanchor
from .tokentrim_policies.registry import DEFAULT_METHOD, make_method
from .tokentrim_policies.stability import token_grid
from .tokentrim_policies.trim import TokenTrim
from .tokentrim_scheduler import lift_scheduler
from .tokentrim_session.arguments import plan_rollout, read_call
from .tokentrim_session.compatibility import fit_layout
from .tokentrim_session.denoise import Denoiser
from .tokentrim_session.draft import Draft
from .tokentrim_session.encode import encode_given, encode_prompts
from .tokentrim_session.given import read_video
from .tokentrim_session.host import Pipeline
from .tokentrim_session.keywords import CallArguments
from .tokentrim_session.noise import Noise
from .tokentrim_session.partition import partition_chunks
from .tokentrim_session.plan import RolloutPlan
from .tokentrim_session.progress import Progress
from .tokentrim_session.prompts import PromptChange
from .tokentrim_session.recording import Recording
from .tokentrim_session.run import Rollout
from .tokentrim_session.schedule import Scheduler
from .tokentrim_session.stream import Chunk, Stream, gather
from .tokentrim_views.averages import MemRoPE
from .tokentrim_views.deep_sink import DeepSink
from .tokentrim_views.layout import Layout, View
from .tokentrim_views.memory import Memory
from .tokentrim_views.registry import make_layout
from .tokentrim_views.rope import rotate
from .tokentrim_views.tether import Tether
from .tokentrim_views.windows import InfinityRope
from .tokentrim_writing import write_whole


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
        method (`str` or `dict`, *optional*): what is done against drift.
        layout (`str` or `dict`, *optional*): which past frames a pass reads, in the place of a window.
        prompt_transition (`str`, *optional*): what becomes of the context when the prompt changes.
        fps (`float`, *optional*): frames per second that the model makes; 16 where a checkpoint says nothing, as for Wan.
    """

    _optional_components = ["tokenizer", "text_encoder", "vae"]

    # What a method of one's own is made of: `class Mine(pipe.ContextPolicy)`, `class Mine(pipe.Layout)`.
    ContextPolicy, Layout, View = ContextPolicy, Layout, View

    if TYPE_CHECKING:  # Diffusers has no types

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self: ...

    Comparison = Comparison  # rollouts side by side: `pipe.Comparison({"plain": plain, "held": held})`

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
        method: str | dict | None = None,
        layout: str | dict | None = None,
        prompt_transition: str | None = None,
        fps: int | float | None = None,
    ):
        settings = {name: value for name, value in locals().items() if name in SETTINGS}
        check_portable(settings)
        is_wan = vae is None or "scale_factor_temporal" in vae.config
        check(is_wan, "vae", type(vae).__name__, "an AutoencoderKLWan, from a causal Wan checkpoint")
        scheduler = lift_scheduler(scheduler) if isinstance(scheduler, SchedulerMixin) else scheduler
        super().__init__(tokenizer, text_encoder, transformer, vae, scheduler)
        self.register_to_config(**settings)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As in Diffusers; code that a checkpoint names for its pipeline is left out, since this class is the code."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(index.get("_class_name"), (list, tuple)):
            index["_class_name"] = cls.__name__
        return loaded

    def __setattr__(self, name: str, value: Any) -> None:
        """A scheduler is lifted: `pipe.scheduler = X.from_config(pipe.scheduler.config)` is all that it takes."""
        super().__setattr__(name, lift_scheduler(value) if isinstance(value, SchedulerMixin) else value)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, include_code: bool = False, **kwargs) -> None:
        """
        Save all components, and the settings of the rollout.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            include_code (`bool`, defaults to `False`):
                Whether to save the code of the pipeline as well, as one file, so that the folder, also once it is pushed
                to the Hub, loads with `trust_remote_code=True` and without this project; without that argument, it does
                not load. A folder that holds the code already keeps it.
            args, kwargs (*optional*): as in [`DiffusionPipeline.save_pretrained`].
        """
        if include_code:
            write_code(save_directory, Path(__file__))
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
        if (Path(save_directory) / PIPELINE_FILE).is_file():
            name_our_classes(save_directory)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        video: torch.Tensor | np.ndarray | list | None = None,
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
        prompt_schedule: dict | list[dict] | None = None,
        prompt_transition: str | dict[int, str] | None = None,
        blend_chunks: int = 0,
        method: str | dict | list | ContextPolicy | None = None,
        prune_fraction: float | None = None,
        drift_sensitivity: float | None = None,
        warmup_chunks: int | None = None,
        max_regenerations: int | None = None,
        drift_signal: str | None = None,
        rollout: str | None = None,
        num_frames_per_chunk: int | None = None,
        layout: str | dict | Layout | None = None,
        window_size: int | str | None = None,
        num_sink_frames: int | None = None,
        relative_positions: bool | None = None,
        sink_at_commit: bool | None = None,
        protect_conditioning: bool = True,
        pad_keys: bool = True,
        renoise: Callable[[int, int], torch.Tensor] | None = None,
        on_chunk: Callable[[int, torch.Tensor, list[dict]], None] | None = None,
        image: PipelineImageInput | None = None,
    ) -> TokenTrimPipelineOutput | tuple:
        r"""
        Generate long videos.

        Arguments that are not listed mean what they mean in [`AnyFlowFARPipeline.__call__`].

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompt or prompts; or pass `prompt_embeds`.
            video (`torch.Tensor`, `np.ndarray` or `list`, *optional*):
                Frames to continue: a tensor (B, T, 3, H, W), an array (B, T, H, W, 3), both in `[0, 1]` or of bytes, or
                images of PIL, of one video or several; T = 4n + 1, of the video's size. Where their latent frames are no
                whole chunks, the first chunk is what is left of them; AnyFlow-FAR and `chunk_partition` refuse that.
            video_latents (`torch.Tensor`, *optional*): the same as latents, (B, T, C, H, W).
            image (`PIL.Image`, `np.ndarray`, `torch.Tensor` or a list, *optional*):
                The first frame: `video` of one frame, in floats in [0, 1] or bytes, cropped to the video's aspect and resized.
            height, width (`int`, *optional*, default to `480`, `832`): size of the video in pixels.
            num_frames (`int`, *optional*, defaults to `81`):
                Frames of the video, 1 or more. Whole chunks are generated, and what is beyond is cut off, frames and
                latents alike; with AnyFlow-FAR the last chunk is what is left.
            num_inference_steps (`int`, *optional*, defaults to `4`): denoising steps of each chunk.
            sigmas (`list[float]`, *optional*):
                Noise levels, falling from 1; the scheduler's shift is applied on top. By default
                linspace(1, 0, S + 1)[:-1] for S steps, whatever the scheduler's own spacing.
            timesteps (`list[float]`, *optional*):
                The same as `scheduler.timesteps` has them, with Euler, LCM and flow-map schedulers: each stands at sigma =
                t / 1000, and is not shifted.
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
                videos generated again), as in every Diffusers pipeline. Steps count from 0 in each chunk. What it changes
                (latents and prompts, in place or returned; `pipe._guidance_scale`, which ends guidance at 1 or less)
                stays until it changes it again.
            max_sequence_length (`int`, *optional*, defaults to `512`): tokens that a prompt is padded to.
            use_mean_velocity (`bool`, defaults to `True`):
                AnyFlow-FAR alone: whether the model is told where a step goes, not only where it is.
            chunk_partition (`list[int]`, *optional*):
                Latent frames of each chunk, instead of `num_frames_per_chunk`. By default of AnyFlow-FAR the model's
                own; for another length its first chunk, and then as many of its second as there is room for.
            method (`str`, `dict`, `list` or `ContextPolicy`, *optional*, defaults to `"tokentrim"`):
                What is done against drift. `"plain"`: nothing. `"tokentrim"`: algorithm 1 of the paper. `"paper"`: the
                same after FlowMo's motion-stabilised initialisation (its section 4.1). `"tokentrim_plus"`, ours:
                quarantine and re-anchoring. Or policies by name with their settings, in chain order:
                `{"quarantine": {"sensitivity": 6}, "reanchor": {"match": "near"}}`. Or an object with the verbs
                of `pipe.ContextPolicy`, which is copied for each video. Or a list of these.
            prune_fraction, drift_sensitivity, warmup_chunks, max_regenerations, drift_signal (*optional*):
                Settings of TokenTrim, see [`TokenTrim`]: by default 0.1, 2.0, 2, 1 and `"final"`.
            prompt_schedule (`dict` or `list[dict]`, *optional*):
                Prompts over time, `{chunk: prompt}`, or one such dict for each prompt; a prompt is a text, a list of one
                for each, or embeddings (B, text, dim). Chunk 0 stands for `prompt`.
            prompt_transition (`str` or `dict`, *optional*, defaults to `"keep"`):
                What becomes of the context at a change, for all or by chunk. `"keep"`: only cross-attention changes.
                `"recache"`: the window is encoded again under the new prompt (LongLive). `"flush"`: the sink and the
                last two frames stay (Infinity-RoPE). `"cut"`: flush, and the chunk stands apart from them.
            blend_chunks (`int`, defaults to `0`): chunks over which the embeddings move from one prompt to the next.
            rollout (`str`, *optional*, defaults to `"self_forcing"`):
                `"self_forcing"`: chunk after chunk, each through all its steps. `"rolling_forcing"`: as many chunks in
                flight as there are steps, denoised together, each a step behind the chunk before it.
            num_frames_per_chunk (`int`, *optional*, defaults to `3`):
                Latent frames of a chunk; with AnyFlow-FAR of all but the first, by default as the model's own.
            layout (`str`, `dict` or `Layout`, *optional*):
                Which past frames a pass reads, and where they stand: a name, a dict of it with its settings, or an
                object with the functions of `pipe.Layout`. By default a window, from the next four arguments.
            window_size (`int` or `"all"`, *optional*):
                Latent frames that attention spans, the current chunk and the sink included. `"all"`, or `None` without a
                setting in the checkpoint: all of the past, whose cache grows without bound.
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
            Whatever the VAE raises, as where memory runs out: with the `latents` of all finished chunks as an attribute.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}

        # 1. Complete the arguments from the checkpoint, and check them before any model runs
        plan = plan_rollout(self, arguments)

        # 2. Encode the prompt, and roll out and decode chunk by chunk
        decodes = output_type != "latent" and not self.vae.use_tiling  # tiles are of all frames
        with Stream(self, self.begin(plan), self._make_decoder() if decodes else None) as stream:
            chunks = gather(stream)

        # 3. Put the chunks together
        chunk_frames = [plan.sizes.chunk_frames(chunk.index) for chunk in chunks]
        if decodes and chunks:
            frames = concatenated([chunk.frames for chunk in chunks])
        else:
            num_videos, channels, *size = plan.sizes.frame_shape
            none = torch.zeros(num_videos, channels, 0, *size, dtype=torch.float32)
            latents = torch.cat([chunk.latents for chunk in chunks], dim=2) if chunks else none
            frames = latents
            if output_type != "latent":
                frames = self.decode_latents(latents, output_type, sum(chunk_frames))
        decisions = [[chunk.decisions[video] for chunk in chunks] for video in range(plan.sizes.num_videos)]
        if not return_dict:
            return (frames, decisions)
        shown = None if output_type == "latent" else chunk_frames
        return TokenTrimPipelineOutput(frames, decisions, stream.grid, shown, stream.progress.fps)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        preview_vae: Any = None,
        state_dir: str | os.PathLike | None = None,
        save_every: int = 10,
        **kwargs: Unpack[CallArguments],
    ) -> Stream:
        """
        The same video while it is made: an iterator over finished chunks, each with `index`, `latents`, `frames` and
        `decisions`, and a context manager. `num_frames=None` goes on until the caller stops.

        Args:
            prompt, args, kwargs: as in [`__call__`].
            preview_vae (*optional*):
                Decodes in the place of the VAE: faster, rougher, such as `AutoencoderTinyVideo` or TAEHV.
            state_dir (`str` or `os.PathLike`, *optional*): where the run is saved, for [`resume`].
            save_every (`int`, defaults to `10`): chunks between two states.
        """
        call = read_call(self._bind(prompt, *args, **kwargs))
        check_int("save_every", save_every, 1)
        plan = plan_rollout(self, call, may_be_endless=True)
        with ExitStack() as held:
            if state_dir is not None:
                os.makedirs(state_dir, exist_ok=True)
                held.enter_context(lock_state(state_dir))
                valid = "a folder without a state: `pipe.resume(state_dir)` goes on with the run that is there"
                check(not has_state(state_dir), "state_dir", str(state_dir), valid)
            run = self.begin(plan)
            decoder = self._make_decoder(preview_vae) if plan.decodes else None
            return Stream(self, run, decoder, state_dir, save_every, record_call(call), held=held.pop_all())

    @torch.no_grad()
    def resume(self, state_dir: str | os.PathLike, preview_vae: Any = None, **objects) -> Stream:
        """
        Go on with the run that a stream saved, to the same bits as if it had not been interrupted.

        Args:
            state_dir (`str` or `os.PathLike`): the stream's.
            preview_vae (*optional*): the stream's.
            objects: arguments that a state cannot hold: callbacks, policies and layouts of one's own.

        Raises:
            `ValueError`: no whole state, other weights, or other arguments; what differs is in the message.
        """
        with ExitStack() as held:
            held.enter_context(lock_state(state_dir))
            state = load_state(state_dir)
            with whole_state(state_dir):
                keep_method(state, DEFAULT_METHOD)
                call = recall(state["call"], objects)
                given = [name for name in SETTINGS if call.get(name) is not None]
                check_same(state["settings"], settings_of(self), given)
                models = {"transformer": self.transformer, "vae": self.vae, "preview_vae": preview_vae}
                check_weights(state["weights"], models)
                plan = plan_rollout(self, call, may_be_endless=True)
            run = self.begin(plan)
            with whole_state(state_dir):
                run.load_state_dict(state["run"])
                decoder = None if state["decoder"] is None else self._make_decoder(preview_vae)
                if decoder is not None:
                    decoder.load_state_dict(state["decoder"])
                saved = [state.get(name) for name in ("save_every", "call", "files", "undecoded")]
                return Stream(self, run, decoder, state_dir, *saved, held=held.pop_all())

    @torch.no_grad()
    def plan(self, prompt: str | list[str] | None = None, *args: Any, **kwargs: Unpack[CallArguments]) -> RolloutPlan:
        """What a call with these arguments would do, completed from the checkpoint and checked; no model runs."""
        return plan_rollout(self, self._bind(prompt, *args, **kwargs))

    @property
    def fps(self) -> float:
        """Frames per second of the videos, as the checkpoint says, or Wan's."""
        return self.config.get("fps") or FPS

    def _make_decoder(self, preview_vae: Any = None) -> FrameDecoder:
        return make_decoder(self.vae, preview_vae, self.vae_scale_factor_temporal)

    def _bind(self, *args, **kwargs) -> dict:
        call = inspect.signature(self.__call__).bind(*args, **kwargs)
        call.apply_defaults()
        return dict(call.arguments)

    @torch.no_grad()
    def roll_out(self, run: Rollout) -> Iterator[Chunk]:
        """Algorithm 1, chunk by chunk. The plain rollout is the same loop with policies that accept everything.

        Args:
            run ([`Rollout`]): from [`begin`], or one that was cut; the transformer is restored when the iterator ends or
                is closed.
        """
        with run.attached(), run.progress_bar() as run.denoiser.progress:
            for index in run.remaining():
                if self.interrupt:
                    return
                run.follow_schedule(index)  # a new prompt, if one is due
                run.backbone.make_room(run.sizes.chunk_size(index))  # the layout says what may leave
                if index < run.sizes.num_given_chunks:  # frames to continue are read as they are, not judged
                    latents = context = run.given[index]
                    run.policies.observe(latents)
                else:
                    draft = run.denoiser.draft(index, run.in_flight)
                    while evicted := {} if self.interrupt else run.evict(run.policies.review(draft.judged)):
                        draft = run.denoiser.redraft(draft, list(evicted))  # eq. 4 to 10: {video: grid tokens}
                    latents, in_flight = run.denoiser.finish(draft)
                    if self.interrupt:
                        return
                    run.in_flight = in_flight
                    context = latents if run.is_last(index) else run.policies.commit(latents)
                if not run.is_last(index):
                    run.denoiser.commit(index, context, run.policies.entered)  # clean forward at t = 0
                run.advance(index)  # from here on the run can be saved and resumed
                yield Chunk(index, run.sizes.cut(index, latents), run.policies.close())

    @torch.no_grad()
    def begin(self, plan: RolloutPlan) -> Rollout:
        """The session of a planned call: the prompt is encoded; no step is taken."""
        check_free(self.transformer)
        device = self._execution_device
        prompt, given = encode_prompts(self, plan, device), encode_given(self, plan, device)
        run = Rollout(self, plan, prompt, device, given)
        for index, change in plan.inputs.prompt_changes.items():
            run.schedule_change(index, change)
        return run

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str, num_frames: int | None = None
    ) -> torch.Tensor | np.ndarray | list:
        """Latents (B, C, T, H, W) to videos as `output_type` asks, of all frames or the first `num_frames`."""
        return decode_all(self, latents, output_type, num_frames)
