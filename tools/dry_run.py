# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Check a conversion from the files' headers: without reading weights, without PyTorch, in a moment."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from .lora import read_lora
from .original import check_whole, infer_config, list_shapes, read_original
from .presets import LARGE, MODELS, PRESETS, check_size, count_held_frames, list_presets
from .tensor_info import TensorInfo


HEIGHT, WIDTH, VAE_FACTOR = 480, 832, 8
GIB = 2**30


def describe_conversion(
    path: Path,
    ema: bool | None = None,
    lora: Path | None = None,
    base: Path | None = None,
    preset: str | None = None,
) -> str:
    """
    The content of an original file, in some lines.

    Args:
        path (`Path`): the file, or the folder or index of sharded ones.
        ema (`bool`, *optional*): whether the moving average is meant. By default, where the file has one.
        lora (`Path`, *optional*): a LoRA that is to be merged.
        base (`Path`, *optional*): Wan2.1 folder; the config of its transformer, if it has one, gives the size of a head.
        preset (`str`, *optional*): preset whose memory is reported. By default, the first that fits.

    Raises:
        `ValueError`: the conversion would fail, as far as headers tell.
    """
    original = read_original(path, ema)
    config = infer_config(path, original.tensors, read_head_dim(base))
    check_whole(original, config)
    shapes = list_shapes(config)
    size = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    presets = list_presets(*size)
    if preset is not None:
        check_size(preset, *size)
    lines = [
        f"file     {path}: {sum_bytes(original.tensors) / GIB:.1f} GiB of weights, {original.chosen or 'a bare state dict'}",
        f"model    text-to-video Wan: {size[0]} blocks, width {size[1]} in {config['num_attention_heads']} heads,"
        f" {sum(map(prod, shapes.values())) / 1e9:.2f} billion parameters,"
        f" {', '.join(sorted({tensor.dtype for tensor in original.tensors.values()}))}",
        f"whole    {len(shapes)} tensors: none is missing, none is left over",
    ]
    if lora is not None:
        pairs = read_lora(lora, shapes).pairs
        ranks = ", ".join(map(str, sorted({pair.rank for pair in pairs.values()})))
        lines.append(f"lora     {lora}: {len(pairs)} of {len(shapes)} weights, rank {ranks}")
    lines.append(f"presets  {suggest_presets(path, presets)}")
    preset = preset or (presets or ["self_forcing"])[0]
    lines.append(
        f"memory   in bfloat16, at {HEIGHT} x {WIDTH}: weights {weight_bytes(config) / GIB:.1f} GiB, cache of"
        f" {count_held_frames(preset)} latent frames {cache_bytes(preset, config) / GIB:.1f} GiB ({preset}); text encoder,"
        " VAE and activations come on top"
    )
    return "\n".join(lines)


def weight_bytes(config: Mapping[str, Any]) -> int:
    """Memory of a transformer's weights in bfloat16."""
    return 2 * sum(map(prod, list_shapes(config).values()))


def cache_bytes(preset: str, config: Mapping[str, Any]) -> int:
    """Memory of the keys and values that a rollout holds, in bfloat16, at 480 x 832 and for one video."""
    width, patch = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"]
    tokens = count_held_frames(preset) * (HEIGHT // (VAE_FACTOR * patch[1])) * (WIDTH // (VAE_FACTOR * patch[2]))
    return 2 * 2 * config["num_layers"] * width * tokens


def describe_presets() -> str:
    """A table of all presets in Markdown, with the memory of each; `docs/checkpoints.md` has it as it is."""
    rows = [("`--preset`", "chunk, steps", "reads", "weights", "cache", "method", "prompts change by"), ("---",) * 7]
    for preset, settings in PRESETS.items():
        config = MODELS["Wan 14B" if preset in LARGE else "Wan 1.3B"]
        rows.append(
            (
                f"`{preset}`",
                f"{settings['num_frames_per_chunk']}, {describe_steps(settings['num_inference_steps'])}",
                describe_context(settings),
                f"{weight_bytes(config) / GIB:.1f} GiB",
                f"{cache_bytes(preset, config) / GIB:.1f} GiB",
                f"`{settings['method']}`",
                f"`{settings.get('prompt_transition', 'keep')}`",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe_steps(steps: int | Mapping[str, int]) -> str:
    return str(steps) if isinstance(steps, int) else f"{steps['rest']} (first {steps['first']})"


def describe_context(settings: Mapping[str, Any]) -> str:
    """Which past frames a preset reads, in words."""
    ((name, layout),) = settings.get("layout", {"": settings}).items()
    sink = layout.get("num_sink_frames", 0)
    words = [f"layout `{name}`: " * bool(name) + f"window {layout['window_size']}"] + [f"sink {sink}"] * bool(sink)
    words += [f"past weighs {layout['weight']}"] if "weight" in layout else []
    if settings["rollout"] != "self_forcing":
        words.append(f"{settings['num_inference_steps']} chunks in flight")
    return ", ".join(words)


def read_head_dim(base: Path | None) -> int:
    config = None if base is None else base / "transformer" / "config.json"
    return json.loads(config.read_text())["attention_head_dim"] if config is not None and config.is_file() else 128


def suggest_presets(path: Path, presets: list[str]) -> str:
    """The presets for a size, and those that the path's words name: weights alone do not tell them apart."""
    if not presets:
        return "none was made for this size (all are for Wan 1.3B or 14B)"
    words = path.as_posix().lower().replace("-", "_")
    named = [name for name in presets if name in words or name.replace("_", "") in words]
    named = [name for name in named if not any(name in other and name != other for other in named)]
    hint = f"; its path suggests {' or '.join(named)}" if named else ""
    return f"{', '.join(presets)} {'fits' if len(presets) == 1 else 'fit'} this size{hint}"


def sum_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensor.num_bytes for tensor in tensors.values())
