# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Original files of causal Wan models, as Diffusers checkpoints."""

import json
import logging
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from transformers import AutoConfig, AutoTokenizer, UMT5Config

from ..pipeline_tokentrim import TokenTrimPipeline
from ..tokentrim_checks import check_choice
from ..tokentrim_files.checkpoint import INDEX
from .copying import check_links, copy_part, name_weights
from .folders import check_new_folder, new_folder
from .headers import read_header
from .lora import read_lora
from .names import FPS
from .original import check_limits, check_whole, infer_config, list_shapes, read_original, require
from .presets import PRESETS, SCHEDULES, check_size
from .tensors import TensorReader, is_finite, merge_pair, write_safetensors


logger = logging.getLogger("tokentrim.convert")

STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model"}  # names of weights
BASE_PARTS = {  # library and class, as a checkpoint's index names them
    "tokenizer": ["transformers", None],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


class OriginalTransformer:
    """
    The transformer in an original file: its config, and its weights under Diffusers' names, read one by one.

    The file is a `.pt` in PyTorch's zip format or a `.safetensors`, sharded or not, with original Wan names, behind any
    prefixes of FSDP, activation checkpointing, `torch.compile` and training wrappers. What is read is logged to
    `tokentrim.convert`.

    Args:
        path (`str` or `os.PathLike`):
            The file, or the folder or index of a sharded one. Only tensors are unpickled.
        ema (`bool`, *optional*):
            Whether to read the moving average of the weights, `generator_ema`. By default, if the file has one.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights, except for the modules that Diffusers keeps in fp32. By default, as in the file.
        attention_head_dim (`int`, defaults to `128`): channels of an attention head, which no shape reveals.
        lora (`str` or `os.PathLike`, *optional*): a LoRA of LongLive, peft or Diffusers to merge, see [`read_lora`].
        config (*optional*): other entries of the transformer's config that no shape reveals, such as `eps`.

    Raises:
        `ValueError`: the file is not such a file, or its keys do not fit; the message says what is wrong and what is valid.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        ema: bool | None = None,
        dtype: torch.dtype | None = None,
        attention_head_dim: int = 128,
        lora: str | os.PathLike | None = None,
        **config: Any,
    ):
        self.original = read_original(Path(path), ema)
        tensors = self.original.tensors
        self.config = infer_config(self.original.path, tensors, attention_head_dim) | config
        check_whole(self.original, self.config)
        self.lora = None if lora is None else read_lora(Path(lora), list_shapes(self.config))
        with init_empty_weights():
            self.model = WanTransformer3DModel(**self.config)
        self.zeros: list[str] = []  # names of weights that were read and are all zero
        self.names = {key: name for name in tensors for key in convert_wan_transformer_to_diffusers({name: None})}
        self.shapes = {key: tensors[name].shape for key, name in self.names.items()}
        if self.shapes != {key: tuple(tensor.shape) for key, tensor in self.model.state_dict().items()}:
            raise RuntimeError(
                "This version of Diffusers has other names or shapes for the tensors of Wan transformers."
            )
        in_fp32 = set(self.model._keep_in_fp32_modules)
        self.dtypes = {}
        for key, name in self.names.items():
            stored = getattr(torch, tensors[name].dtype)
            self.dtypes[key] = stored if dtype is None else torch.float32 if in_fp32 & set(key.split(".")) else dtype
        dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
        num_parameters = sum(map(prod, self.shapes.values()))
        logger.info("tensors   %d, each in its place: %s parameters, %s", len(tensors), f"{num_parameters:,}", dtypes)
        logger.info("config    %s", {name: self.config[name] for name in sorted(self.config)})

    def reader(self) -> Callable[[str], torch.Tensor]:
        """A function that reads a weight by Diffusers' name, with the LoRA merged into it."""
        original, lora = self.original, self.lora
        read = TensorReader(original.path, original.chosen, original.tensors, original.keys)
        read_matrix = lora and TensorReader(lora.path, lora.chosen, lora.tensors)

        def read_weight(key: str) -> torch.Tensor:
            name, dtype = self.names[key], self.dtypes[key]
            weight = read(name)
            require(is_finite(weight), "path", "finite", f"{name} of {original.path} holds NaN or Inf")
            if lora is not None and name in lora.pairs:
                weight = merge_pair(weight, lora.pairs[name], lora.path, read_matrix)
                require(is_finite(weight), "lora", "finite", f"with {lora.path}, {name} holds NaN or Inf")
            if not weight.any():
                self.zeros.append(name)
            converted = weight.to(dtype)
            require(is_finite(converted), "dtype", "one that holds the weights", f"{name} leaves the range of {dtype}")
            return converted

        return read_weight

    def tell_zeros(self) -> None:
        """Tensors without a value: trained models hardly have any, files that were damaged do."""
        if self.zeros:
            told = ", ".join(self.zeros[:10]) + (", ..." if len(self.zeros) > 10 else "")
            logger.warning(
                "zeros     %d of %d tensors hold nothing but zeros: %s", len(self.zeros), len(self.names), told
            )


def load_original_transformer(path: str | os.PathLike, **arguments: Any) -> WanTransformer3DModel:
    """The transformer of an original file, in evaluation mode; arguments and errors as of [`OriginalTransformer`]."""
    source = OriginalTransformer(path, **arguments)
    read = source.reader()
    source.model.load_state_dict({name: read(name) for name in source.names}, assign=True)
    source.tell_zeros()
    return source.model.eval()


def convert_checkpoint(
    path: str | os.PathLike,
    base: str | os.PathLike,
    out: str | os.PathLike,
    preset: str,
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
    lora: str | os.PathLike | None = None,
) -> None:
    r"""
    Write a checkpoint folder that [`TokenTrimPipeline`] loads: the transformer of an original file, its schedule and
    its rollout settings, and the tokenizer, text encoder and VAE of a Wan2.1 folder, copied. Weights are read, merged
    and written one by one. The folder appears when it is complete; a failure leaves nothing behind.

    Args:
        path (`str` or `os.PathLike`): the original file, see [`OriginalTransformer`].
        base (`str` or `os.PathLike`): a Wan2.1 text-to-video folder in Diffusers format.
        out (`str` or `os.PathLike`): the folder to write, new or empty.
        preset (`str`): one of `PRESETS`, the rollout that the model was trained for.
        ema (`bool`, *optional*): whether to read the moving average. By default, where the file has one.
        dtype (`torch.dtype`, *optional*): dtype of the transformer. By default, as in the file.
        lora (`str` or `os.PathLike`, *optional*): a LoRA to merge.

    Raises:
        `TypeError`, `ValueError`: an argument or a file is invalid; the message says what is valid.
    """
    base, out = Path(base), Path(out).absolute()
    check_choice("preset", preset, list(PRESETS))
    check_new_folder(out)
    for name in BASE_PARTS:
        valid = f"a Wan2.1 folder in Diffusers format, with {', '.join(f'{part}/' for part in BASE_PARTS)}"
        require((base / name).is_dir(), "base", valid, f"{base} has no {name}/")

    source = OriginalTransformer(path, ema, dtype, lora=lora, **_base_config(base))
    config = source.config
    check_size(preset, config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"])
    tokenizer, text_width, channels = (_check_part(base, name) for name in BASE_PARTS)
    needs = tuple(config[name] for name in ("text_dim", "in_channels", "out_channels"))
    gives = (text_width, channels, channels)
    valid = f"a folder that fits the text width, latent channels in and out {needs} of {path}"
    require(needs == gives, "base", valid, f"{base} is for {gives}")

    check_links("base", base)
    scheduler = FlowMatchLCMScheduler(**SCHEDULES[preset])
    pipe = TokenTrimPipeline(tokenizer, None, source.model, None, scheduler, **PRESETS[preset], fps=FPS)
    with new_folder(out) as folder:
        for name in BASE_PARTS:
            copy_part(base / name, folder / name, STEMS.get(name))
            if name in STEMS:
                read_header(folder / name)  # complete, also by the index of a variant
        pipe.save_config(folder)
        _name_parts(folder / INDEX, tokenizer)
        pipe.scheduler.save_pretrained(folder / "scheduler")
        source.model.save_config(folder / "transformer")
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        write_safetensors(weights, source.dtypes, source.shapes, source.reader())
        source.tell_zeros()
    logger.info("preset    %s: %s, schedule %s", preset, PRESETS[preset], SCHEDULES[preset])
    logger.info("written   %s", out)


def _base_config(base: Path) -> dict[str, Any]:
    """What no shape tells, from the config of the base's own transformer, if it has one."""
    if not (base / "transformer" / WanTransformer3DModel.config_name).is_file():
        return {}
    config = WanTransformer3DModel.load_config(base / "transformer", local_files_only=True)
    known = {name: config[name] for name in ("attention_head_dim", "eps", "rope_max_seq_len") if name in config}
    check_limits("base", base / "transformer", known)
    return known


def _check_part(base: Path, name: str) -> Any:
    """The tokenizer, the text encoder's width or the VAE's latent channels; that of weights, all are there."""
    folder = base / name
    try:
        if name == "tokenizer":
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        name_weights(folder, STEMS[name])
        read_header(folder)
        if name == "text_encoder":
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            require(isinstance(config, UMT5Config), "base", "a folder with a UMT5 text encoder", f"has {type(config)}")
            return config.d_model
        return AutoencoderKLWan.load_config(folder, local_files_only=True)["z_dim"]
    except Exception as error:  # whatever the libraries raise for a broken folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"`base` must be a complete folder, but {folder} does not load: {reason}") from error


def _name_parts(index: Path, tokenizer: Any) -> None:
    """Name the parts that were copied in a checkpoint's index."""
    parts = BASE_PARTS | {"tokenizer": ["transformers", type(tokenizer).__name__]}
    index.write_text(json.dumps(json.loads(index.read_text()) | parts, indent=2, sort_keys=True) + "\n")
