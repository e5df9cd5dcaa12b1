# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Report what a checkpoint is, whether it runs, and whether its model learned the order of frames."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import ModelCard

from ..pipeline_tokentrim import TokenTrimPipeline
from ..tokentrim_backbones.wan import WanBackbone
from ..tokentrim_files.checkpoint import INDEX, SETTINGS
from ..tokentrim_policies.stability import token_grid
from ..tokentrim_views.layout import Layout, Pass, View
from .checkpoints import read_rollout
from .component_sizes import check_components
from .headers import read_header
from .loading import load_checkpoint
from .memory import estimate_memory
from .original import require
from .presets import SCHEDULES, SIZES
from .tensor_info import load_json


REQUIRED, OPTIONAL = ("transformer", "scheduler"), ("tokenizer", "text_encoder", "vae")
LEVELS = (0.8, 0.65, 0.5)  # of noise at which the order of frames is tested
# What of the error is left where a model can read its neighbour. In 12 videos of the three shipped worlds and 3 of the
# doctor's own 0.13 to 0.53 beside the past; in 5 of a world whose attention was trained without order, 0.80 to 1.10.
HELPS = 0.7
# Relative distance of the embeddings of two prompts. Those of the shipped worlds' encoders: 0.40 to 1.30.
LISTENS = 0.01
OTHER_PROMPTS = ("a green ring moving up over a white background", "an empty street at night, seen from above")
GIB = 2**30


def examine(
    folder: Path,
    prompt: str = "a red fox trots through snow",
    dtype: torch.dtype | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[dict[str, str], list[str]]:
    """
    Load a checkpoint, run two chunks and the test of the order of frames.

    Args:
        folder (`Path`): a checkpoint in Diffusers format.
        prompt (`str`): of the two chunks.
        dtype (`torch.dtype`, *optional*): of the weights. By default, float32 on a CPU, else bfloat16.
        height (`int`, *optional*), width (`int`, *optional*): in pixels. By default, the checkpoint's.

    Returns:
        `tuple[dict[str, str], list[str]]`: findings by topic, and odd findings.

    Raises:
        `ValueError`: there is no checkpoint, or it is so broken that it does not load.
    """
    index, odd = read_index(folder), []
    for part in OPTIONAL:
        if not has_part(folder, index, part):
            odd.append(f"there is no {part}: {'no latents become frames' if part == 'vae' else 'no prompt is read'}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    given = {part: None for part in OPTIONAL if not has_part(folder, index, part)}
    if not any(index.get(name) for name in SETTINGS):
        given["rollout"] = "self_forcing"  # to examine bidirectional models too, which do not load without one
    pipe = load_checkpoint(folder, dtype, **given).to(device)
    pipe.set_progress_bar_config(disable=True)
    odd += check_settings(pipe, index)

    found = describe_settings(folder, pipe) | {"size": describe_size(folder, pipe, height, width)}
    broken = list_broken_weights(pipe)
    if broken:
        odd.append(f"NaN or Inf in the weights: {', '.join(broken[:3])}" + (", ..." if len(broken) > 3 else ""))
        found |= dict.fromkeys(("numbers", "order", "speed"), "not tried: the weights are not finite")
        return found, odd
    if pipe.text_encoder is not None and pipe.tokenizer is not None:
        odd += check_text_encoder(pipe, prompt)
    latents, frames, text, seconds = run_two_chunks(pipe, prompt, height, width)
    found["numbers"] = (
        f"all finite: weights and two chunks; latents of mean {latents.mean():.2f} and deviation {latents.std():.2f}"
    )
    if frames is not None:
        found["numbers"] += f", frames of mean {frames.mean():.2f} and deviation {frames.std():.2f}"
        if frames.std() < 0.01:
            odd.append("the frames show nothing: they have one color")
    found["order"] = "not tested: AnyFlow-FAR reads its past in two resolutions"
    if isinstance(pipe.transformer, WanTransformer3DModel):
        found["order"], wrong = judge_order(*measure_order(pipe, latents, text))
        odd += wrong
    size = " x ".join(str(side * pipe.vae_scale_factor_spatial) for side in latents.shape[3:])
    num_frames = (latents.shape[2] - 1) * pipe.vae_scale_factor_temporal + 1
    memory = psutil.Process().memory_info().rss
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    found["speed"] = (
        f"{num_frames} frames of {size} in {seconds:.1f} s on {device.type}, {num_frames / seconds:.2g} a second;"
        f" {memory / GIB:.1f} GiB of memory"
    )
    return found, odd


def format_report(found: dict[str, str], odd: Sequence[str]) -> str:
    """Eleven lines."""
    topics = ("checkpoint", "parts", "rollout", "context", "size", "schedule", "licence", "numbers", "order", "speed")
    return "\n".join(
        [*(f"{topic:10}  {found[topic]}" for topic in topics), f"{'odd':10}  {'; '.join(odd) or 'nothing'}"]
    )


# What it says of itself


def read_index(folder: Path) -> dict[str, Any]:
    """The checkpoint's index. Whatever does not load for a simple reason is refused here."""
    valid = f"a folder in Diffusers format, with a {INDEX}"
    require((folder / INDEX).is_file(), "checkpoint", valid, f"{folder} has none")
    try:
        index = dict(load_json((folder / INDEX).read_text()))
    except (EOFError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"`checkpoint` must be {valid}, but that of {folder} is unreadable: {error}") from error
    lacks = [part for part in REQUIRED if not has_part(folder, index, part)]
    require(not lacks, "checkpoint", f"a folder with {' and '.join(REQUIRED)}", f"{folder} has no {', '.join(lacks)}")
    check_components("checkpoint", folder)
    for part in ("transformer", "text_encoder", "vae"):
        if has_part(folder, index, part) and list((folder / part).glob("*.safetensors")):
            read_header(folder / part)  # complete, or an error that says which file is not
    return read_rollout(folder)


def has_part(folder: Path, index: dict[str, Any], part: str) -> bool:
    named = index.get(part)
    return isinstance(named, list) and bool(named) and bool(named[0]) and (folder / part).is_dir()


def describe_settings(folder: Path, pipe: TokenTrimPipeline) -> dict[str, str]:
    config, settings, plan = pipe.transformer.config, pipe.config, pipe.plan(**no_prompt(pipe))
    width = config.num_attention_heads * config.attention_head_dim
    named = settings.get("layout") or "window"
    layout = named if isinstance(named, str) else next(iter(named))
    context = {name: value for name, value in vars(plan.layout).items() if name != "one_chunk_a_pass"}
    pipe.scheduler.set_rollout_timesteps(plan.schedule.num_inference_steps)
    timesteps = " ".join(f"{timestep:.0f}" for timestep in pipe.scheduler.timesteps)
    licence = None
    if (folder / "README.md").is_file():
        licence = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    return {
        "checkpoint": f"{folder}: {type(pipe.transformer).__name__}, {config.num_layers} blocks of width {width},"
        f" {pipe.transformer.num_parameters() / 1e6:,.1f} million parameters",
        "parts": ", ".join(
            type(getattr(pipe, part)).__name__ for part in (*OPTIONAL, *REQUIRED) if getattr(pipe, part) is not None
        ),
        "rollout": f"{plan.schedule.rollout}, chunks of {plan.sizes.chunk_size(1)} latent frames, {plan.schedule.num_inference_steps} steps,"
        f" method {settings.get('method') or 'tokentrim'}, prompts change by {settings.get('prompt_transition') or 'keep'}",
        "context": f"{layout}: {', '.join(f'{name} {value}' for name, value in context.items())}",
        "schedule": f"{type(pipe.scheduler).__name__}, shift {shift_of(pipe.scheduler)}, timesteps {timesteps}",
        "licence": licence or "not said in a README.md here: see its publisher's",
    }


def describe_size(folder: Path, pipe: TokenTrimPipeline, height: int | None = None, width: int | None = None) -> str:
    """The size that the weights were published for, and the memory of a video of it and of others."""
    config, dtype = pipe.transformer.config, str(pipe.transformer.dtype).removeprefix("torch.")
    is_known = (config.num_layers, config.num_attention_heads * config.attention_head_dim) in SIZES
    own = pipe.config.get("height"), pipe.config.get("width")
    published = own if all(own) else (480, 832)
    told = f"published for {published[0]} x {published[1]}" if all(own) or is_known else "not said for which size"
    sizes = [published, (height or published[0], width or published[1])]
    sizes += [(832, 480), (640, 640), (720, 1280)] if is_known else [tuple(2 * side for side in published)]
    caches = []
    for size in dict.fromkeys(sizes):
        weights, cache = estimate_memory(folder, dict(zip(("height", "width"), size)), dtype)
        caches.append(f"{size[0]} x {size[1]} {cache / GIB:.3g} GiB")
    return f"{told}; weights {weights / GIB:.3g} GiB in {dtype}, cache of a video at {', '.join(caches)}"


def no_prompt(pipe: TokenTrimPipeline) -> dict[str, Any]:
    """Arguments of a call without words."""
    length = pipe.config.get("max_sequence_length") or 512
    embeds = torch.zeros(1, length, pipe.transformer.config.text_dim)
    return {"prompt_embeds": embeds, "output_type": "latent", "method": "plain"}


def shift_of(scheduler: Any) -> float | None:
    return scheduler.config.get("shift", scheduler.config.get("flow_shift"))


def check_settings(pipe: TokenTrimPipeline, index: dict[str, Any]) -> list[str]:
    """What is odd about the settings."""
    config, odd = pipe.transformer.config, []
    if not any(index.get(name) for name in SETTINGS):
        odd.append(f"{INDEX} says nothing of a rollout: a plain Wan folder, or one that another program wrote")
    elif pipe.config.get("layout") is None and pipe.config.get("window_size") is None:
        odd.append("no window: the cache grows with the video")
    size = SIZES.get((config.num_layers, config.num_attention_heads * config.attention_head_dim))
    shifts = sorted({schedule["shift"] for schedule in SCHEDULES.values()})
    if size and not any(abs((shift_of(pipe.scheduler) or 1.0) - shift) < 1e-6 for shift in shifts):
        known = " or ".join(f"{shift:.3g}" for shift in shifts)
        odd.append(f"shift {shift_of(pipe.scheduler)}: causal models of {size} were trained with {known}")
    if index.get("transformer_2", [None])[0]:
        odd.append("two transformers, as in Wan 2.2: the second is never used here")
    for part, has, needs in (
        ("vae", pipe.vae and pipe.vae.config.z_dim, config.in_channels),
        ("text_encoder", pipe.text_encoder and pipe.text_encoder.config.d_model, config.text_dim),
    ):
        require(has is None or has == needs, part, f"of {needs} channels, as the transformer's", f"has {has}")
    return odd


# What it does


def list_broken_weights(pipe: TokenTrimPipeline) -> list[str]:
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    return [
        f"{name}.{key}"
        for name, model in models.items()
        for key, weight in model.state_dict().items()
        if weight.is_floating_point() and not torch.isfinite(weight.float()).all()
    ]


@torch.no_grad()
def check_text_encoder(pipe: TokenTrimPipeline, prompt: str) -> list[str]:
    """Encode two prompts of different tokens: what is odd if a text encoder makes the same of both, or no numbers."""
    length = pipe.config.get("max_sequence_length") or 512
    tokens = [pipe.tokenizer(each).input_ids for each in (prompt, *OTHER_PROMPTS)]
    others = [number for number, each in enumerate(tokens) if each != tokens[0]]
    if not others:
        return ["the tokenizer gives the same tokens for different prompts"]
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length}
    embeds = [pipe.encode_prompt(each, **options)[0][0].float() for each in (prompt, *OTHER_PROMPTS)]  # (text, dim)
    if not all(each.isfinite().all() for each in embeds):
        return ["the text encoder gives NaN or Inf"]
    distances = []
    for number in others:  # of the tokens that both have: padding is zero
        known = min(len(tokens[0]), len(tokens[number]), length)
        first, second = embeds[0][:known], embeds[number][:known]
        distances.append((second - first).norm() / max(first.norm(), second.norm(), 1e-12))
    if max(distances) >= LISTENS:
        return []
    return [f"the text encoder does not listen: embeddings of two prompts differ by {100 * max(distances):.2g}%"]


def run_two_chunks(
    pipe: TokenTrimPipeline, prompt: str, height: int | None, width: int | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, float]:
    """Latents (1, C, T, H, W), frames if there is a VAE, text embeddings, and seconds."""
    call = {**no_prompt(pipe), "height": height, "width": width, "generator": torch.Generator().manual_seed(0)}
    if pipe.text_encoder is not None and pipe.tokenizer is not None:
        call |= {"prompt": prompt, "prompt_embeds": None}
    if pipe.vae is not None:
        call["output_type"] = "pt"
    plan = pipe.plan(**call)
    num_latent_frames = plan.sizes.chunk_size(0) + plan.sizes.chunk_size(1)
    call["num_frames"] = (num_latent_frames - 1) * pipe.vae_scale_factor_temporal + 1
    start = time.perf_counter()
    with pipe.stream(**call) as stream:
        text = stream.run.denoiser.prompt.embeds
        chunks = list(stream)
    seconds = time.perf_counter() - start
    frames = None if pipe.vae is None else torch.cat([chunk.frames for chunk in chunks], dim=1)
    return torch.cat([chunk.latents for chunk in chunks], dim=2), frames, text, seconds


class Neighbour(Layout):
    """A chunk and one other, which stands directly before or after it."""

    def __init__(self, is_after: bool):
        self.is_after = is_after

    def view(self, held: list[int], new: list[int], pass_: Pass) -> View:
        shift = len(held) + len(new) if self.is_after else 0
        return View(held, [frame + shift for frame in held], new)


@torch.no_grad()
def measure_order(pipe: TokenTrimPipeline, latents: torch.Tensor, text: torch.Tensor) -> tuple[float, float]:
    """
    What is left of the error of the flow of a chunk, when its clean neighbour is read: of the second chunk beside its
    past, and of the first beside its future. A model that was trained chunk by chunk reads a clean past, and has never
    seen a future; a bidirectional one has never seen a clean neighbour of a noised chunk.

    Args:
        pipe: with a Wan transformer.
        latents (`torch.Tensor`): of two chunks, (1, C, T, H, W).
        text (`torch.Tensor`): embeddings, (1, text, dim).
    """
    sizes = [latents.shape[2] // 2, latents.shape[2] - latents.shape[2] // 2]
    first, second = latents.float().split(sizes, dim=2)
    past = flow_error(pipe, second, text, first, False) / flow_error(pipe, second, text)
    future = flow_error(pipe, first, text, second, True) / flow_error(pipe, first, text)
    return past, future


def flow_error(
    pipe: TokenTrimPipeline,
    chunk: torch.Tensor,
    text: torch.Tensor,
    neighbour: torch.Tensor | None = None,
    is_after: bool = False,
) -> float:
    """Mean squared error of the flow of a chunk at some levels of noise, alone or beside a clean neighbour."""
    grid = token_grid(tuple(chunk.shape[3:]), pipe.transformer.config.patch_size)
    backbone = WanBackbone(pipe.transformer, grid, num_videos=1, layout=Neighbour(is_after))
    noise = torch.randn(chunk.shape, generator=torch.Generator().manual_seed(0)).to(chunk)
    with backbone.attached():
        if neighbour is not None:
            backbone.make_room(neighbour.shape[2])
            backbone.commit(neighbour, text, [True])
        backbone.make_room(chunk.shape[2])
        errors = []
        for level in LEVELS:
            noised, timestep = torch.lerp(chunk, noise, level), torch.full((1,), 1000 * level, device=chunk.device)
            flow = backbone.predict_flow(noised, [chunk.shape[2]], timestep, timestep, text)
            errors.append((flow.float() - (noise - chunk)).square().mean())
    return torch.stack(errors).mean().item()


def judge_order(past: float, future: float) -> tuple[str, list[str]]:
    """What the test of the order of frames says, and what is odd. A heuristic: see [`measure_order`]."""
    measured = f"of the error of a noised chunk is left {past:.2f} beside its past, {future:.2f} beside its future"
    if past > HELPS:
        odd = "the past does not help: bidirectional weights, as plain Wan's, or random ones (a heuristic)"
        return f"{measured}: not trained chunk by chunk", [odd]
    if future < min(HELPS, 2 * past):
        return f"{measured}: it reads both", ["the future helps as well: bidirectional weights (a heuristic)"]
    return f"{measured}: trained chunk by chunk", []
