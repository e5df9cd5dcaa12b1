# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim (arXiv 2602.00268) for causal video diffusion models in Diffusers: the pipeline."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from transformers import AutoTokenizer, UMT5EncoderModel


try:
    from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler
except ImportError as error:
    from diffusers import __version__ as found

    needed = f"TokenTrim needs diffusers 0.39.0 or newer, but {found} is here: `pip install -U diffusers`."
    raise ImportError(needed) from error

from .tokentrim_backbones.attention import check_free
from .tokentrim_backbones.backbone import Backbone
from .tokentrim_backbones.far import FARBackbone
from .tokentrim_backbones.hooks import check_hooks
from .tokentrim_backbones.parallel import check_parallel
from .tokentrim_backbones.registry import backbone_of
from .tokentrim_backbones.wan import rotary_dims
from .tokentrim_checks import check
from .tokentrim_files.bundle import bundle
from .tokentrim_files.checkpoint import CheckpointMixin, complete_settings
from .tokentrim_files.foreign import rollout_settings
from .tokentrim_files.loaders import name_loaders
from .tokentrim_files.packing import pack_state
from .tokentrim_files.run_state import load_state
from .tokentrim_frames.colors import color_drift
from .tokentrim_frames.comparison import Comparison
from .tokentrim_frames.decode import decode_all, make_decoder
from .tokentrim_frames.fragments import encode_chunk
from .tokentrim_frames.mp4 import FPS
from .tokentrim_frames.output import TokenTrimPipelineOutput
from .tokentrim_frames.pictures import as_rgb
from .tokentrim_frames.summary import tell_run
from .tokentrim_kv.book import take_tokens
from .tokentrim_kv.cache import RollingKVCache
from .tokentrim_kv.hooks import LayoutHooks
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
from .tokentrim_policies.references import Reference
from .tokentrim_policies.registry import make_method
from .tokentrim_policies.stability import token_grid
from .tokentrim_policies.trim import TokenTrim
from .tokentrim_scheduler import lift_scheduler
from .tokentrim_session.arguments import bind_call, plan_rollout
from .tokentrim_session.chunk import Chunk
from .tokentrim_session.compatibility import fit_layout
from .tokentrim_session.denoise import Denoiser
from .tokentrim_session.draft import Draft
from .tokentrim_session.encode import encode_prompts
from .tokentrim_session.examples import CALL_EXAMPLE, STREAM_EXAMPLE, with_example
from .tokentrim_session.gather import gather, join_chunks
from .tokentrim_session.given import read_video
from .tokentrim_session.history import History
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
from .tokentrim_session.start import begin_run, resume_stream, start_stream
from .tokentrim_session.stream import Stream
from .tokentrim_views.averages import MemRoPE
from .tokentrim_views.deep_sink import DeepSink
from .tokentrim_views.heads import ByHead
from .tokentrim_views.layout import Layout
from .tokentrim_views.memory import Memory
from .tokentrim_views.recall import Shots
from .tokentrim_views.registry import make_layout
from .tokentrim_views.rope import rotate
from .tokentrim_views.tether import Tether
from .tokentrim_views.triattention import TriAttention
from .tokentrim_views.view import View
from .tokentrim_views.windows import InfinityRope
from .tokentrim_writing import write_whole


class TokenTrimPipeline(CheckpointMixin, AnyFlowFARPipeline):
    r"""Long video from causal (chunk by chunk) Wan models, with a rolling KV cache and a method against drift. In
    TokenTrim ([arXiv 2602.00268](https://huggingface.co/papers/2602.00268)), when a chunk has drifted abnormally far
    from the one before it, its most changed tokens leave the cache and the chunk is generated again.

    This model inherits from [`AnyFlowFARPipeline`]. Check the superclass documentation for text encoding and LoRA.

    Args:
        tokenizer ([`AutoTokenizer`]): tokenizer of the text encoder; `None` if prompts are passed as `prompt_embeds`.
        text_encoder ([`UMT5EncoderModel`]): text encoder; `None` if prompts are passed as `prompt_embeds`.
        transformer ([`WanTransformer3DModel`] or [`AnyFlowFARTransformer3DModel`]): chunk-causal video transformer.
        vae ([`AutoencoderKLWan`]): video VAE; `None` if `output_type` is always `"latent"`.
        scheduler ([`SchedulerMixin`]): any flow-matching scheduler; it gets [`TokenTrimSchedulerMixin`].
        rollout, num_frames_per_chunk, window_size, num_sink_frames, relative_positions, context_noise, num_inference_steps,
        height, width, max_sequence_length, method, layout, prompt_transition (*optional*):
            Defaults of the arguments of [`__call__`] with these names, saved in a checkpoint's `model_index.json`.
        fps (`float`, *optional*, defaults to `16`): frames per second that the model makes.
    """

    _code = Path(__file__)
    _optional_components = ["tokenizer", "text_encoder", "vae"]

    # Base classes for custom methods and layouts: `class Mine(pipe.ContextPolicy)`, `class Mine(pipe.Layout)`.
    ContextPolicy, Layout, View = ContextPolicy, Layout, View

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
        context_noise: float | None = None,
        num_inference_steps: int | dict[str, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        method: str | dict | None = None,
        layout: str | dict | None = None,
        prompt_transition: str | None = None,
        fps: int | float | None = None,
    ):
        settings = complete_settings(locals())
        is_wan = vae is None or "scale_factor_temporal" in vae.config
        check(is_wan, "vae", type(vae).__name__, "an AutoencoderKLWan, from a causal Wan checkpoint")
        scheduler = lift_scheduler(scheduler) if isinstance(scheduler, SchedulerMixin) else scheduler
        super().__init__(tokenizer, text_encoder, transformer, vae, scheduler)
        self.register_to_config(**settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Every scheduler that is set gets our mixin, as in `pipe.scheduler = X.from_config(pipe.scheduler.config)`."""
        super().__setattr__(name, lift_scheduler(value) if isinstance(value, SchedulerMixin) else value)

    @torch.no_grad()
    @with_example(CALL_EXAMPLE)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        video: torch.Tensor | np.ndarray | list | None = None,
        video_latents: torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | dict[str, int] | None = None,
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
        context_noise: float | None = None,
    ) -> TokenTrimPipelineOutput | tuple:
        r"""
        Generate long videos.

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompt or prompts. Alternatively, pass `prompt_embeds`.
            video (`torch.Tensor`, `np.ndarray` or `list`, *optional*):
                Frames to continue, 4n + 1 of them, of the video's size: a tensor (B, T, 3, H, W) or an array (B, T, H,
                W, 3) of floats in `[0, 1]`, uint8 or uint16, or a list of PIL images, of one video or several. If they
                do not fill whole chunks, the first chunk is shorter; AnyFlow-FAR and `chunk_partition` refuse that.
            video_latents (`torch.Tensor`, *optional*): latent frames to continue, (B, T, C, H, W), instead of `video`.
            negative_prompt (`str` or `list[str]`, *optional*): what to avoid, if `guidance_scale` is above 1.
            height, width (`int`, *optional*, default to `480`, `832`): size of the video in pixels.
            num_frames (`int`, *optional*, defaults to `81`):
                Frames of the video. Whole chunks are generated, and frames and latents beyond this length are cut off;
                with AnyFlow-FAR the last chunk is shorter instead.
            num_inference_steps (`int` or `dict`, *optional*, defaults to `4`):
                Denoising steps of each chunk; `{"first": 4, "rest": 2}` where the first generated chunk takes others.
            sigmas (`list[float]`, *optional*):
                Noise levels, falling from 1, before the scheduler's shift; by default `linspace(1, 0, S + 1)[:-1]`.
            timesteps (`list[float]`, *optional*):
                Timesteps, for Euler, LCM and flow-map schedulers; each stands for sigma = t / 1000 and is not shifted.
            guidance_scale (`float`, defaults to `1.0`): classifier-free guidance, if above 1.
            num_videos_per_prompt (`int`, defaults to `1`): videos of each prompt.
            generator (`torch.Generator` or a list, *optional*): with a list, one a video, a batch equals single runs.
            latents (`torch.Tensor`, *optional*): initial noise of all chunks, (B, C, T, H, W).
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): text embeddings, (B, text, dim).
            output_type (`str`, defaults to `"np"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): whether to return an output object instead of a tuple.
            attention_kwargs (`dict`, *optional*): passed to the transformer, such as `{"scale": 0.5}`.
            callback_on_step_end (`Callable`, *optional*):
                `callback_on_step_end(pipe, step, timestep, tensors)`, called after each denoising step of each chunk, in
                regenerations with the `latents` of their videos. Its changes last, in place or in the dict it returns.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors that it gets, of `"latents"`, `"prompt_embeds"` and `"negative_prompt_embeds"`.
            max_sequence_length (`int`, *optional*, defaults to `512`): tokens that a prompt is padded to.
            use_mean_velocity (`bool`, defaults to `True`): AnyFlow-FAR only: tell the model the timestep after the step.
            use_kv_cache (`bool`, defaults to `True`): `True`; a rollout always reads the cache.
            chunk_partition (`list[int]`, *optional*):
                Latent frames of each chunk, instead of `num_frames_per_chunk`; AnyFlow-FAR models have a default.
            prompt_schedule (`dict` or `list[dict]`, *optional*):
                Prompts over time, `{chunk: prompt}`, or one such dict for each prompt. A prompt is a text, a list of
                texts, one for each prompt, or embeddings (B, text, dim). Chunk 0 replaces `prompt`.
            prompt_transition (`str` or `dict`, *optional*, defaults to `"keep"`):
                What happens to the context at a change, for all or by chunk. `"keep"`: only cross-attention changes.
                `"recache"`: the window is encoded again under the new prompt (LongLive). `"flush"`: only the sink and
                the last two frames stay (Infinity-RoPE); `"cut"`: the next chunk also stands apart. `"shot"`: see `shots`.
            blend_chunks (`int`, defaults to `0`): chunks over which the embeddings move from one prompt to the next.
            method (`str`, `dict`, `list` or `ContextPolicy`, *optional*, defaults to `"tokentrim"`):
                What is done against drift: `"plain"` (nothing), `"tokentrim"` (algorithm 1 of the paper), `"paper"`
                (after FlowMo, section 4.1), ours `"tokentrim_reference"` (against the first chunk) or `"tokentrim_plus"`
                (quarantine and re-anchoring); a dict of policies in chain order, `{"quarantine": {"sensitivity": 6},
                "reanchor": {"match": "near"}}`; a `pipe.ContextPolicy`, copied for each video; or a list of these.
            prune_fraction, drift_sensitivity, warmup_chunks, max_regenerations, drift_signal (*optional*):
                Settings of [`TokenTrim`], by default 0.1, 2.0, 2, 1 and `"final"`.
            rollout (`str`, *optional*, defaults to `"self_forcing"`):
                `"self_forcing"`: one chunk after the other. `"rolling_forcing"`: as many chunks as there are steps are
                denoised together, each a step behind the one before; `"wave_forcing"`: each reads only those before it.
            num_frames_per_chunk (`int`, *optional*, defaults to `3`):
                Latent frames of a chunk; with AnyFlow-FAR, of all but the first, and the model's own by default.
            layout (`str`, `dict` or `Layout`, *optional*):
                Which past frames a pass reads, and where they stand: a name, a dict of a name with its settings, or a
                `pipe.Layout`. The default is a window, as the next four arguments describe it.
            window_size (`int` or `"all"`, *optional*, defaults to `"all"`):
                Latent frames that attention spans, with the current chunk and the sink; `"all"` lets the cache grow.
            num_sink_frames (`int`, *optional*): first frames that never leave the cache; 0, or a chunk if rolling.
            relative_positions (`bool`, *optional*): count positions inside the window, the sink first; only if rolling.
            sink_at_commit (`bool`, *optional*): read the sink in context passes too; by default unless rolling.
            protect_conditioning (`bool`, defaults to `True`): never evict tokens of the frames to continue.
            pad_keys (`bool`, defaults to `True`): AnyFlow-FAR only: attend to upstream's zero keys; `False`: as in training.
            renoise (`Callable`, *optional*):
                `renoise(chunk, step)` returns the noise, (B, C, frames, H, W), that re-noises a chunk after a step. By
                default it is drawn from `generator`, once for all attempts at a chunk.
            on_chunk (`Callable`, *optional*):
                `on_chunk(index, latents, decisions)`, called after each generated chunk with copies of its latents,
                (B, C, frames, H, W), and its decisions, one for each video.
            image (`PIL.Image`, `np.ndarray`, `torch.Tensor` or a list, *optional*):
                The first frame, instead of `video`, cropped to the video's aspect and resized.
            context_noise (`float`, *optional*, defaults to `0.0`):
                Timestep, 0 to 1000, that context passes tell the model; their latents are clean in any case.

        Examples:

        Returns:
            [`TokenTrimPipelineOutput`] or `tuple`: with `return_dict=False`, `(frames, decisions)`.

        Raises:
            `TypeError`, `ValueError`: an argument is invalid; the message names it, its value and what is valid.
            `RuntimeError`: the model's output is NaN or Inf; the message names the chunk and the step or pass.
            Any error of the VAE, such as out of memory, has the `latents` of all finished chunks as an attribute.
        """
        # 1. Complete the arguments from the checkpoint, and check them before any model runs
        plan = plan_rollout(self, {name: value for name, value in locals().items() if name != "self"})

        # 2. Encode the prompt, then roll out and decode chunk by chunk; a tiled VAE decodes all chunks at the end
        by_chunk = plan.decodes and not self.vae.use_tiling
        with Stream(self, self.begin(plan), make_decoder(self.vae) if by_chunk else None) as stream:
            chunks = gather(stream)

        # 3. Put the chunks together
        frames, decisions, chunk_frames = join_chunks(self, plan, chunks)
        if not return_dict:
            return (frames, decisions)
        return TokenTrimPipelineOutput(frames, decisions, stream.grid, chunk_frames, stream.progress.fps)

    @torch.no_grad()
    @with_example(STREAM_EXAMPLE)
    def stream(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        preview_vae: Any = None,
        state_dir: str | os.PathLike | None = None,
        save_every: int = 10,
        keep_states: int = 0,
        **kwargs: Unpack[CallArguments],
    ) -> Stream:
        """
        Generate the same videos chunk by chunk.

        Args:
            prompt, args, kwargs: as in [`__call__`]. With `num_frames=None`, the video has no end.
            preview_vae (*optional*): a faster, rougher VAE to decode with, such as `AutoencoderTinyVideo` or TAEHV.
            state_dir (`str` or `os.PathLike`, *optional*): folder that the run is saved to, for [`resume`].
            save_every (`int`, defaults to `10`): chunks between two saved states.
            keep_states (`int`, defaults to `0`): chunks that [`Stream.back`] can take back. Their states, each as large as
                the cache, are kept in memory, or in `state_dir`.

        Examples:

        Returns:
            [`Stream`]: an iterator over finished chunks, each with `index`, `latents`, `frames` and `decisions`, and a
            context manager. The transformer is restored when it ends or is closed.
        """
        return start_stream(
            self, bind_call(self, prompt, *args, **kwargs), preview_vae, state_dir, save_every, keep_states
        )

    @torch.no_grad()
    def resume(self, state_dir: str | os.PathLike, preview_vae: Any = None, **objects) -> Stream:
        """
        Continue a run that a stream saved, to the same bits as without the interruption.

        Args:
            state_dir (`str` or `os.PathLike`), preview_vae (*optional*): those of the stream.
            objects: arguments of the stream that a state cannot hold: callbacks, custom policies and layouts.

        Returns:
            [`Stream`]: the rest of the run.

        Raises:
            `ValueError`: there is no whole state, or weights or arguments are not the run's; the message says which.
        """
        return resume_stream(self, state_dir, preview_vae, objects)

    @torch.no_grad()
    def plan(self, prompt: str | list[str] | None = None, *args: Any, **kwargs: Unpack[CallArguments]) -> RolloutPlan:
        """The plan of a call with these arguments, completed from the checkpoint and checked. No model runs."""
        return plan_rollout(self, bind_call(self, prompt, *args, **kwargs))

    @property
    def fps(self) -> float:
        """Frames per second of the videos, as the checkpoint says, or Wan's."""
        return self.config.get("fps") or FPS

    @torch.no_grad()
    def roll_out(self, run: Rollout) -> Iterator[Chunk]:
        """Algorithm 1, chunk by chunk. The plain rollout is the same loop with policies that accept everything.

        Args:
            run ([`Rollout`]): a new or a resumed run. The transformer is restored when the iterator ends or is closed.
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
        """A new run of a planned call: prompts and frames to continue are encoded, nothing is denoised yet."""
        return begin_run(self, plan)

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str, num_frames: int | None = None
    ) -> torch.Tensor | np.ndarray | list:
        """Decode latents, (B, C, T, H, W), to videos of an output type: all frames, or the first `num_frames`."""
        return decode_all(self, latents, output_type, num_frames)
