# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""LoRA files of Wan models, from their headers: which pair of matrices belongs to which weight, and with which scale."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .headers import TensorInfo, read_header, read_safetensors_header
from .original import WRAPPERS, require


logger = logging.getLogger("tokentrim.convert")

PREFIXES = ("base_model.", "module.", "model.", "generator.", "transformer.", "diffusion_model.")  # at a key's start
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
    The pairs in a LoRA file of LongLive (`generator_lora`), peft or Diffusers, without the matrices.

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
    try:
        file = read_header(path)
    except ValueError as error:
        raise ValueError(str(error).replace("`path`", "`lora`")) from error
    require(isinstance(file, Mapping), "lora", "a LoRA file", f"{path} holds a {type(file).__name__}")
    chosen = next(
        (name for name in ("generator_lora", "lora", "state_dict") if isinstance(file.get(name), Mapping)), None
    )
    state = file[chosen] if chosen else file
    pairs, alpha = {}, read_alpha(path)
    for module, parts in group_keys(path, state).items():
        lacks = {"A", "B"} - parts.keys()
        require(not lacks, "lora", "a LoRA with two matrices for each module", f"{path} has no {lacks} of {module}")
        down, up, shape = state[parts["A"]].shape, state[parts["B"]].shape, shapes.get(f"{module}.weight")
        require(shape is not None, "lora", "a LoRA of this model", f"{path} is for {module}, which it does not have")
        valid = f"a LoRA of this model, whose {module} is {shape}"
        fits = len(down) == len(up) == 2 and (up[0], down[1]) == shape and up[1] == down[0]
        require(fits, "lora", valid, f"in {path} A is {down} and B is {up}")
        pairs[f"{module}.weight"] = Pair(parts["A"], parts["B"], parts.get("alpha", alpha), down[0])
    ranks = ", ".join(map(str, sorted({pair.rank for pair in pairs.values()})))
    known = {type(pair.alpha) for pair in pairs.values()}
    origin = (
        "of each weight" if str in known else "as the rank, since none is given" if alpha is None else f"{alpha:g}"
    )
    logger.info("lora      %s: %d weights, rank %s, alpha %s", path, len(pairs), ranks, origin)
    return Lora(path, chosen, dict(state), pairs)


def group_keys(path: Path, state: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The keys of A, B and alpha by the original name of their module."""
    groups, unknown = {}, []
    for key, value in state.items():
        match = KEY.fullmatch(str(key))
        if match is None or not isinstance(value, TensorInfo):
            unknown.append(str(key))
            continue
        part = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", None: "alpha"}[match["matrix"]]
        module = name_module(match["module"] or match["scaled"])
        twice = part in groups.setdefault(module, {})
        require(not twice, "lora", "a file of one LoRA", f"{path} has two {part} of {module}")
        groups[module][part] = key
    valid = "a LoRA whose keys are MODULE.lora_A.weight and MODULE.lora_B.weight, or lora_down and lora_up"
    given = f"{path} has {len(unknown)} other keys, such as {', '.join(unknown[:3])}"
    require(not unknown, "lora", valid, given)
    require(bool(groups), "lora", valid, f"{path} is empty")
    return groups


def name_module(name: str) -> str:
    """The original name of a module, without what wrapped it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    for diffusers, original in ORIGINAL_NAMES:
        name = name.replace(diffusers, original)
    return name


def read_alpha(path: Path) -> float | None:
    """Alpha by peft's config beside the file, or by Diffusers' metadata in it; None where neither is there.

    Raises:
        `ValueError`: they tell of more than one alpha and one rank.
    """
    settings = {}
    if (config := path.with_name("adapter_config.json")).is_file():
        settings = json.loads(config.read_text())
    elif path.suffix == ".safetensors":
        metadata = read_safetensors_header(path).get("__metadata__", {}).get("lora_adapter_metadata", "{}")
        settings = {key.removeprefix("transformer."): value for key, value in json.loads(metadata).items()}
    other = [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if settings.get(name)]
    require(not other, "lora", "a LoRA with one alpha and one rank", f"the settings of {path} have {', '.join(other)}")
    return float(settings["lora_alpha"]) if "lora_alpha" in settings else None
