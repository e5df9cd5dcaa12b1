# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""LoRA files of Wan models, from their headers: which pair of matrices belongs to which weight, and with which scale."""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .headers import read_header, read_safetensors_header
from .original import WRAPPERS, require
from .tensor_info import DAMAGED, TensorInfo, brief, listed, load_json


logger = logging.getLogger("tokentrim.convert")

PREFIXES = ("base_model.", "module.", "model.", "generator.", "transformer.", "diffusion_model.")  # at a key's start
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")  # of kohya's and musubi's keys, which have "_" for each "."
ELSEWHERE = "other kinds may still load into the pipeline with `pipe.load_lora_weights`"
# peft's names, then those of other trainers; peft puts the adapter's name behind its own.
KEY = re.compile(r"(?P<module>.+)\.(?P<matrix>lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.weight|(?P<scaled>.+)\.alpha")
ORIGINAL_NAMES = (  # of modules that Diffusers renames
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
)


@dataclass(frozen=True)
class Pair:
    """W + (alpha / rank) B A, with A (rank, in) and B (out, rank)."""

    down: str  # the key of A in the state dict
    up: str  # that of B
    alpha: float | str | None  # a number, the key of one, or None for the rank
    rank: int


@dataclass(frozen=True)
class Lora:
    """The matrices in a file.

    Args:
        path (`Path`): the file.
        chosen (`str`, *optional*): the state dict in it; None where the file is one.
        tensors (`dict[str, TensorInfo]`): the state dict.
        pairs (`dict[str, Pair]`): by the original name of the weight that they change.
    """

    path: Path
    chosen: str | None
    tensors: dict[str, TensorInfo]
    pairs: dict[str, Pair]


def read_lora(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """
    The pairs in a LoRA file of LongLive (`generator_lora`), peft, Diffusers, kohya or musubi, without the matrices.

    Alpha is a tensor of the file, else what peft's `adapter_config.json` beside it or Diffusers' metadata in it say,
    else the rank.

    Args:
        path (`Path`): `.pt` or `.safetensors`, or a folder of peft.
        shapes (`Mapping[str, tuple[int, ...]]`): of the model's weights, by original name.

    Raises:
        `ValueError`: the file holds no LoRA, or that of another model.
    """
    if path.is_dir() and (path / "adapter_model.safetensors").is_file():
        path = path / "adapter_model.safetensors"
    file = read_lora_header(path)
    require(isinstance(file, Mapping), "lora", "a LoRA file", f"{path} holds a {type(file).__name__}")
    chosen = next(
        (name for name in ("generator_lora", "lora", "state_dict") if isinstance(file.get(name), Mapping)), None
    )
    state = file[chosen] if chosen else file
    pairs, (alpha, rank) = {}, read_settings(path)
    for module, parts in group_keys(path, state, shapes).items():
        lacks = {"A", "B"} - parts.keys()
        require(not lacks, "lora", "a LoRA with two matrices for each module", f"{path} has no {lacks} of {module}")
        down, up, shape = state[parts["A"]].shape, state[parts["B"]].shape, shapes.get(f"{module}.weight")
        require(shape is not None, "lora", "a LoRA of this model", f"{path} is for {module}, which it does not have")
        valid = f"a LoRA of this model, whose {module} is {shape}"
        fits = len(down) == len(up) == 2 and (up[0], down[1]) == shape and up[1] == down[0]
        require(fits, "lora", valid, f"in {path} A is {down} and B is {up}")
        require(rank in (None, down[0]), "lora", f"of rank {rank}, as its settings say", f"{path} has {down[0]}")
        own_alpha = alpha if "alpha" not in parts else read_own_alpha(path, parts["alpha"], state[parts["alpha"]])
        pairs[f"{module}.weight"] = Pair(parts["A"], parts["B"], own_alpha, down[0])
    ranks = ", ".join(map(str, sorted({pair.rank for pair in pairs.values()})))
    known = {type(pair.alpha) for pair in pairs.values()}
    origin = (
        "of each weight" if str in known else "as the rank, since none is given" if alpha is None else f"{alpha:g}"
    )
    logger.info("lora      %s: %d weights, rank %s, alpha %s", path, len(pairs), ranks, origin)
    tensors = {key: value for key, value in state.items() if isinstance(value, TensorInfo)}
    return Lora(path, chosen, tensors, pairs)


def read_lora_header(path: Path) -> Any:
    try:
        return read_header(path)
    except ValueError as error:
        raise ValueError(str(error).replace("`path`", "`lora`")) from error


def group_keys(
    path: Path, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, str]]:
    """The keys of A, B and alpha by the original name of their module."""
    groups, unknown = {}, []
    modules = [name.removesuffix(".weight") for name in shapes]
    for key, value in state.items():
        match = KEY.fullmatch(str(key))
        is_number = type(value) in (int, float) and match is not None and match["scaled"]
        if match is None or not (isinstance(value, TensorInfo) or is_number):
            unknown.append(str(key))
            continue
        part = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", None: "alpha"}[match["matrix"]]
        module = name_module(match["module"] or match["scaled"], modules)
        twice = part in groups.setdefault(module, {})
        require(not twice, "lora", "a file of one LoRA", f"{path} has two {part} of {module}")
        groups[module][part] = key
    valid = "a LoRA whose keys are MODULE.lora_A.weight and MODULE.lora_B.weight, or lora_down and lora_up"
    given = f"{path} has {len(unknown)} other keys, such as {listed(unknown, 3)}; {ELSEWHERE}"
    require(not unknown, "lora", valid, given)
    require(bool(groups), "lora", valid, f"{path} is empty")
    return groups


def name_module(name: str, modules: Sequence[str] = ()) -> str:
    """The original name of a module, without what wrapped it; of kohya's names, the one among `modules`."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in KOHYA_PREFIXES:
        if name.startswith(prefix):
            return find_flat(name.removeprefix(prefix), modules) or name
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    for diffusers, original in ORIGINAL_NAMES:
        name = name.replace(diffusers, original)
    return name


def find_flat(name: str, modules: Sequence[str]) -> str | None:
    """The module that kohya's and musubi's trainers write as `name`, with "_" for each "."; original or Diffusers' names."""
    flat = {module.replace(".", "_"): module for module in modules}
    for diffusers, original in ORIGINAL_NAMES:
        if name in flat:
            break
        name = name.replace(diffusers.replace(".", "_"), original.replace(".", "_"))
    return flat.get(name)


def read_own_alpha(path: Path, key: str, value: Any) -> float | str:
    """A module's alpha in the file: a number, or the key of a tensor that holds one."""
    if not isinstance(value, TensorInfo):
        return check_alpha(path, value, key)
    require(prod(value.shape) == 1, "lora", "a LoRA with one alpha a module", f"in {path} {key} is {value.shape}")
    return key


def check_alpha(path: Path, value: Any, key: str) -> float:
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    require(is_number, "lora", "a LoRA whose alpha is a finite number", f"in {path} {key} is {brief(value)}")
    return float(value)


def read_settings(path: Path) -> tuple[float | None, int | None]:
    """Alpha and rank by peft's config beside the file, or by Diffusers' metadata in it; None where neither says it.

    Raises:
        `ValueError`: they say more than one alpha and one rank, or none that is a number.
    """
    settings, source = {}, path
    try:
        if (config := path.with_name("adapter_config.json")).is_file():
            source = config
            settings = dict(load_json(config.read_text()))
        elif path.suffix == ".safetensors":
            metadata = read_safetensors_header(path).get("__metadata__", {}).get("lora_adapter_metadata", "{}")
            settings = {key.removeprefix("transformer."): value for key, value in load_json(metadata).items()}
    except (*DAMAGED, ValueError) as error:
        raise ValueError(
            f"`lora` must be a LoRA with readable settings, but those of {source} are not: {error}"
        ) from error
    other = [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if settings.get(name)]
    given = f"the settings of {source} have {', '.join(other)}; {ELSEWHERE}"
    require(not other, "lora", "a LoRA with one alpha and one rank", given)
    rank = settings.get("r")
    require(rank is None or type(rank) is int, "lora", "a LoRA of one rank", f"in {source} r is {brief(rank)}")
    if "lora_alpha" not in settings:
        return None, rank
    return check_alpha(source, settings["lora_alpha"], "lora_alpha"), rank
