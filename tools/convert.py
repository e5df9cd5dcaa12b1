# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Original files of Self Forcing, Rolling Forcing, LongLive, CausVid and Causal Forcing, as Diffusers checkpoints."""

import logging
import math
import os
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from transformers import AutoTokenizer, UMT5EncoderModel

from ..pipeline_tokentrim import TokenTrimPipeline
from ..tokentrim_checks import check_choice
from .presets import PRESETS, SCHEDULES


logger = logging.getLogger("tokentrim.convert")

BASE_PARTS = {"tokenizer": AutoTokenizer, "text_encoder": UMT5EncoderModel, "vae": AutoencoderKLWan}

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # anywhere in a key
PREFIXES = ("module.", "model.", "diffusion_model.")  # at its start
LAYOUTS = "{'generator': ..., 'generator_ema': ...}, {'model': ...} or a bare state dict"


def load_original_transformer(
    path: str | os.PathLike,
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
    attention_head_dim: int = 128,
    **config: Any,
) -> WanTransformer3DModel:
    r"""
    The transformer in an original file: `.pt` in PyTorch's zip format, or `.safetensors`; original Wan names, behind
    any prefixes that FSDP, activation checkpointing, `torch.compile` and the training wrapper left. What was found is
    logged to `tokentrim.convert`.

    Args:
        path (`str` or `os.PathLike`): the file. Nothing in it but tensors is unpickled.
        ema (`bool`, *optional*):
            Whether to read the moving average of the weights, `generator_ema`. By default, where the file has one.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights, but for the modules that Diffusers keeps in fp32. By default, as in the file.
        attention_head_dim (`int`, defaults to `128`): channels of an attention head, which no shape tells.
        config (*optional*): whatever else of the transformer's config no shape tells, such as `eps`.

    Returns:
        [`WanTransformer3DModel`]: in evaluation mode; every tensor of the file is in it, and no other.

    Raises:
        `ValueError`: the file is no such file, or its keys do not fit; what is wrong and what is valid are in the
            message.
    """
    path = Path(path)
    weights = _strip_prefixes(path, _choose_weights(path, _read(path), ema))
    config = {**_infer_config(path, weights), "attention_head_dim": attention_head_dim, **config}
    width = weights["patch_embedding.weight"].shape[0]
    valid = f"a divisor of the width {width} of {path}"
    _require(width % attention_head_dim == 0, "attention_head_dim", valid, f"is {attention_head_dim}")
    config["num_attention_heads"] = width // attention_head_dim
    with init_empty_weights():
        transformer = WanTransformer3DModel(**config)
    weights = _rename(path, weights, transformer)
    if dtype is not None:
        in_fp32 = set(transformer._keep_in_fp32_modules)
        weights = {
            name: tensor.to(torch.float32 if in_fp32 & set(name.split(".")) else dtype)
            for name, tensor in weights.items()
        }
    transformer.load_state_dict(weights, assign=True)

    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    logger.info(
        "tensors   %d, each in its place: %s parameters, %s", len(weights), f"{num_parameters:,}", ", ".join(dtypes)
    )
    logger.info("config    %s", {name: config[name] for name in sorted(config)})
    return transformer.eval()


def convert_checkpoint(
    path: str | os.PathLike,
    base: str | os.PathLike,
    out: str | os.PathLike,
    preset: str,
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    r"""
    Write a checkpoint folder that [`TokenTrimPipeline`] loads: the transformer of an original file, its schedule and
    its rollout settings, and the tokenizer, text encoder and VAE of a Wan2.1 folder. The folder appears when it is
    complete; a failure leaves nothing behind.

    Args:
        path (`str` or `os.PathLike`): the original file, see [`load_original_transformer`].
        base (`str` or `os.PathLike`): a Wan2.1 text-to-video folder in Diffusers format.
        out (`str` or `os.PathLike`): the folder to write, new or empty.
        preset (`str`): one of `PRESETS`, the rollout that the model was trained for.
        ema (`bool`, *optional*): whether to read the moving average. By default, where the file has one.
        dtype (`torch.dtype`, *optional*): dtype of the transformer. By default, as in the file.

    Raises:
        `TypeError`, `ValueError`: an argument or a file is no good; what is valid is in the message.
    """
    base, out = Path(base), Path(out).absolute()
    check_choice("preset", preset, list(PRESETS))
    fresh = not out.exists() or out.is_dir() and not any(out.iterdir())
    _require(fresh, "out", "a new or an empty folder", f"{out} is there already")
    for name in BASE_PARTS:
        valid = f"a Wan2.1 folder in Diffusers format, with {', '.join(f'{part}/' for part in BASE_PARTS)}"
        _require((base / name).is_dir(), "base", valid, f"{base} has no {name}/")

    transformer = load_original_transformer(path, ema, dtype, **_base_config(base))
    parts = {name: _load_part(base, name) for name in BASE_PARTS}
    needs = transformer.config.text_dim, transformer.config.in_channels, transformer.config.out_channels
    gives = parts["text_encoder"].config.d_model, parts["vae"].config.z_dim, parts["vae"].config.z_dim
    valid = f"a folder that fits the text width, latent channels in and out {needs} of {path}"
    _require(needs == gives, "base", valid, f"{base} is for {gives}")

    scheduler = FlowMatchLCMScheduler(**SCHEDULES[preset])
    pipe = TokenTrimPipeline(**parts, transformer=transformer, scheduler=scheduler, **PRESETS[preset])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        pipe.save_pretrained(Path(partial) / out.name)
        if out.exists():
            out.rmdir()
        os.replace(Path(partial) / out.name, out)
    logger.info("preset    %s: %s, schedule %s", preset, PRESETS[preset], SCHEDULES[preset])
    logger.info("written   %s", out)


def _require(ok: bool, name: str, valid: str, given: str) -> None:
    """Raise `ValueError` unless `ok`."""
    if not ok:
        raise ValueError(f"`{name}` has to be {valid}, but {given}.")


def _read(path: Path) -> Any:
    """What the file holds, its tensors mapped from the disk."""
    given = "is a folder" if path.is_dir() else "does not exist"
    _require(path.is_file(), "path", "a .pt or .safetensors file", f"{path} {given}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].split(". ")[0]
        raise ValueError(
            f"`path` has to be a file of tensors alone, but {path} needs more to be unpickled, which could run any"
            f" code: {reason}. Where you trust it, save its state dict as .safetensors first."
        ) from error
    except (safetensors.SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"`path` has to be a complete .safetensors file, or .pt file in the zip format of `torch.save`, but {path}"
            f" is truncated or something else: {str(error).splitlines()[0]}"
        ) from error


def _choose_weights(path: Path, file: Any, ema: bool | None) -> dict[str, torch.Tensor]:
    """The state dict that was asked for."""
    layouts = f"a file laid out as {LAYOUTS}"
    _require(isinstance(file, Mapping), "path", layouts, f"{path} holds a {type(file).__name__}")
    keys = [str(key) for state in (file, *file.values()) if isinstance(state, Mapping) for key in state]
    has_lora = any(".lora_" in key or key.endswith("_lora") for key in keys)
    valid = "a whole model (merge a LoRA into the model that it was trained on, and convert that)"
    _require(not has_lora, "path", valid, f"{path} holds a LoRA")
    if any(torch.is_tensor(value) for value in file.values()):
        file = {"state dict": file}
    plain = next((name for name in ("generator", "model", "state dict") if name in file), None)
    has_ema = "generator_ema" in file
    _require(plain or has_ema, "path", layouts, f"the top level of {path} is {list(file)}")
    _require(has_ema or not ema, "ema", "None or False for a file without EMA weights", f"{path} has only {plain!r}")
    valid = "None or True for a file with EMA weights alone"
    _require(plain or ema is not False, "ema", valid, f"{path} has only 'generator_ema'")

    chosen = "generator_ema" if has_ema and ema is not False else plain
    weights = file[chosen]
    valid = "a file whose weights are a state dict of floating-point tensors"
    _require(isinstance(weights, Mapping), "path", valid, f"in {path} {chosen!r} is a {type(weights).__name__}")
    others = [key for key, value in weights.items() if not (torch.is_tensor(value) and value.is_floating_point())]
    _require(not others, "path", valid, f"in {path} {chosen!r} also holds {others}")
    left = ", ".join(name for name in file if name != chosen) or "nothing"
    note = "" if has_ema else " (there are no EMA weights)"
    logger.info("file      %s: takes %s%s, leaves %s", path, chosen, note, left)
    return {str(key): tensor for key, tensor in weights.items()}


def _strip_prefixes(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names that the model itself gave them."""
    stripped, found = {}, {}
    for key, tensor in weights.items():
        name = key
        for wrapper in WRAPPERS:
            if wrapper in name:
                name, found[wrapper] = name.replace(wrapper, ""), None
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name, found[prefix] = name.removeprefix(prefix), None
        _require(name not in stripped, "path", "a file with one key for each tensor", f"{path} has two for {name}")
        stripped[name] = tensor
    logger.info("prefixes  %s", ", ".join(found) or "none")
    return stripped


def _infer_config(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the shapes tell of a text-to-video transformer's config."""
    names = ("patch_embedding", "text_embedding.0", "time_embedding.0", "blocks.0.ffn.0", "head.head")
    shapes = {name: tuple(weights[f"{name}.weight"].shape) for name in names if f"{name}.weight" in weights}
    lacks = [name for name in names if len(shapes.get(name, ())) != (5 if name == "patch_embedding" else 2)]
    given = f"{path} has no {', '.join(lacks)}; it begins with {', '.join(list(weights)[:3])}"
    _require(not lacks, "path", "a Wan transformer under its original names", given)
    _, in_channels, *patch_size = shapes["patch_embedding"]
    return {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "out_channels": shapes["head.head"][0] // math.prod(patch_size),
        "text_dim": shapes["text_embedding.0"][1],
        "freq_dim": shapes["time_embedding.0"][1],
        "ffn_dim": shapes["blocks.0.ffn.0"][0],
        "num_layers": len({match[0] for match in map(re.compile(r"blocks\.\d+\.").match, weights) if match}),
    }


def _rename(
    path: Path, weights: dict[str, torch.Tensor], transformer: WanTransformer3DModel
) -> dict[str, torch.Tensor]:
    """The same tensors under Diffusers' names; each fits one of the transformer's, and all of those are there."""
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    renamed, unexpected, misshapen = {}, [], []
    for key, tensor in weights.items():
        names = list(convert_wan_transformer_to_diffusers({key: tensor}))
        if len(names) != 1 or names[0] not in expected or names[0] in renamed:
            unexpected.append(key)
        elif tuple(tensor.shape) != expected[names[0]]:
            misshapen.append(f"{key} {tuple(tensor.shape)} instead of {expected[names[0]]}")
        renamed.update(dict.fromkeys(names, tensor))
    missing = [name for name in expected if name not in renamed]
    wrong = {"missing (Diffusers' names)": missing, "unexpected": unexpected, "of another shape": misshapen}
    report = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in wrong.items() if keys)
    _require(not report, "path", "a text-to-video WanTransformer3DModel", f"in {path} are {report}")
    return renamed


def _base_config(base: Path) -> dict[str, Any]:
    """What no shape tells, from the config of the base's own transformer, if it has one."""
    if not (base / "transformer" / WanTransformer3DModel.config_name).is_file():
        return {}
    config = WanTransformer3DModel.load_config(base / "transformer", local_files_only=True)
    return {name: config[name] for name in ("attention_head_dim", "eps", "rope_max_seq_len") if name in config}


def _load_part(base: Path, name: str) -> Any:
    try:
        return BASE_PARTS[name].from_pretrained(base / name, local_files_only=True)
    except Exception as error:  # whatever the libraries raise for a broken folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"`base` has to be a complete folder, but {base / name} does not load: {reason}") from error
