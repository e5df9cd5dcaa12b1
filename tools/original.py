# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Original files of causal Wan models, from their headers: which weights are taken, and whether they are a whole model."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .headers import read_header
from .tensor_info import TensorInfo, brief, listed


logger = logging.getLogger("tokentrim.convert")

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # anywhere in a key
PREFIXES = ("module.", "model.", "diffusion_model.")  # at its start
# The largest sizes that are believed: many times those of published models (14B: 40 blocks of width 5120).
LIMITS = {
    "num_attention_heads": 1024,
    "attention_head_dim": 1024,
    "in_channels": 1024,
    "out_channels": 1024,
    "text_dim": 2**16,
    "freq_dim": 2**16,
    "ffn_dim": 2**18,
    "num_layers": 512,
    "rope_max_seq_len": 2**16,
}
LAYOUTS = "{'generator': ..., 'generator_ema': ...}, {'model': ...} or a bare state dict"


@dataclass(frozen=True)
class Original:
    """The weights that are taken from a file.

    Args:
        path (`Path`): the file, or the folder or index of sharded ones.
        chosen (`str`, *optional*): the state dict in it; None where the file is one.
        tensors (`dict[str, TensorInfo]`): by the names that the model itself gave them.
        keys (`dict[str, str]`): the key in the state dict, by the same names.
    """

    path: Path
    chosen: str | None
    tensors: dict[str, TensorInfo]
    keys: dict[str, str]


def require(ok: bool, name: str, valid: str, given: str) -> None:
    """Raise `ValueError` unless `ok`."""
    if not ok:
        raise ValueError(f"`{name}` must be {valid}, but {given}.")


def read_original(path: Path, ema: bool | None = None) -> Original:
    """
    The weights in a file, without the weights. What was found is logged to `tokentrim.convert`.

    Args:
        path (`Path`): see [`read_header`].
        ema (`bool`, *optional*): whether to take `generator_ema`. By default, where the file has one.

    Raises:
        `ValueError`: the file holds no model in a known layout.
    """
    header = read_header(path)
    chosen, state = choose_weights(path, header, ema)
    keys = strip_prefixes(path, list(state))
    return Original(path, chosen, {name: state[key] for name, key in keys.items()}, keys)


def choose_weights(path: Path, file: Any, ema: bool | None) -> tuple[str | None, Mapping[str, TensorInfo]]:
    """The state dict that was asked for, and its name in the file."""
    layouts = f"a file laid out as {LAYOUTS}"
    require(isinstance(file, Mapping), "path", layouts, f"{path} holds a {type(file).__name__}")
    keys = [str(key) for state in (file, *file.values()) if isinstance(state, Mapping) for key in state]
    has_lora = any(".lora_" in key or key.endswith("_lora") for key in keys)
    valid = "a whole model (a LoRA goes into `lora`, and the model that it was trained on here)"
    require(not has_lora, "path", valid, f"{path} holds a LoRA")
    bare = any(isinstance(value, TensorInfo) for value in file.values())
    if bare:
        file = {"state dict": file}
    plain = next((name for name in ("generator", "model", "state dict") if name in file), None)
    has_ema = "generator_ema" in file
    require(plain or has_ema, "path", layouts, f"the top level of {path} is {brief(list(file))}")
    require(has_ema or not ema, "ema", "None or False for a file without EMA weights", f"{path} has only {plain!r}")
    valid = "None or True for a file with EMA weights alone"
    require(plain or ema is not False, "ema", valid, f"{path} has only 'generator_ema'")

    chosen = "generator_ema" if has_ema and ema is not False else plain
    state, hint = file[chosen], ""
    if has_ema:
        flag, other = ("--no-ema", plain) if chosen == "generator_ema" else ("--ema", "generator_ema")
        hint = f"; {flag} takes {other!r}" if other else "; --no-ema would take 'generator', which is missing"
    valid = "a file whose weights are a state dict of floating-point tensors"
    given = f"in {path} {chosen!r} is {'empty' if isinstance(state, Mapping) else f'a {type(state).__name__}'}{hint}"
    require(isinstance(state, Mapping) and len(state) > 0, "path", valid, given)
    others = [key for key, value in state.items() if not (type(key) is str and is_weight(value))]
    require(not others, "path", valid, f"in {path} {chosen!r} also holds {listed(others)}")
    left = listed([name for name in file if name != chosen]) or "nothing"
    note = "" if has_ema else " (there are no EMA weights)"
    logger.info("file      %s: takes %s%s, leaves %s", path, chosen, note, left)
    return None if bare else chosen, state


def is_weight(value: Any) -> bool:
    return isinstance(value, TensorInfo) and value.is_float


def strip_prefixes(path: Path, keys: list[str]) -> dict[str, str]:
    """The keys by the names that the model itself gave them."""
    stripped, found = {}, {}
    for key in keys:
        name = key
        for wrapper in WRAPPERS:
            if wrapper in name:
                name, found[wrapper] = name.replace(wrapper, ""), None
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name, found[prefix] = name.removeprefix(prefix), None
        require(name not in stripped, "path", "a file with one key for each tensor", f"{path} has two for {name}")
        stripped[name] = key
    logger.info("prefixes  %s", ", ".join(found) or "none")
    return stripped


def infer_config(path: Path, tensors: Mapping[str, TensorInfo], attention_head_dim: int) -> dict[str, Any]:
    """The transformer's config: what the shapes tell of it, and the size of a head, which they do not."""
    names = ("patch_embedding", "text_embedding.0", "time_embedding.0", "blocks.0.ffn.0", "head.head")
    shapes = {name: tensors[f"{name}.weight"].shape for name in names if f"{name}.weight" in tensors}
    lacks = [name for name in names if len(shapes.get(name, ())) != (5 if name == "patch_embedding" else 2)]
    is_converted = any(name.startswith("condition_embedder.") for name in tensors)
    hint = " (Diffusers' names: its folder loads as it is)" if is_converted else ""
    given = f"{path} has no {', '.join(lacks)}; it begins with {', '.join(list(tensors)[:3])}{hint}"
    require(not lacks, "path", "a Wan transformer under its original names", given)
    width, in_channels, *patch_size = shapes["patch_embedding"]
    valid = f"a divisor of the width {width} of {path}"
    is_size = type(attention_head_dim) is int and attention_head_dim > 0
    require(is_size and width % attention_head_dim == 0, "attention_head_dim", valid, f"is {attention_head_dim!r}")
    require(all(0 < side <= 64 for side in patch_size), "path", "of patches of 1 to 64", f"{path} has {patch_size}")
    config = {
        "patch_size": tuple(patch_size),
        "num_attention_heads": width // attention_head_dim,
        "attention_head_dim": attention_head_dim,
        "in_channels": in_channels,
        "out_channels": shapes["head.head"][0] // prod(patch_size),
        "text_dim": shapes["text_embedding.0"][1],
        "freq_dim": shapes["time_embedding.0"][1],
        "ffn_dim": shapes["blocks.0.ffn.0"][0],
        "num_layers": len({match[0] for match in map(re.compile(r"blocks\.\d+\.").match, tensors) if match}),
    }
    check_limits("path", path, config)
    return config


def check_limits(name: str, path: Path, config: Mapping[str, Any]) -> None:
    """Refuse sizes of a config that no model has: a file may promise any, and they decide how much is allocated."""
    for key in LIMITS.keys() & config.keys():
        size, valid = config[key], f"of a `{key}` of 1 to {LIMITS[key]}"
        require(type(size) is int and 0 < size <= LIMITS[key], name, valid, f"{path} has {brief(size)}")


def list_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a text-to-video Wan transformer, by its original name."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    ffn, patch = config["ffn_dim"], config["patch_size"]
    linear = {  # (out, in)
        "text_embedding.0": (width, config["text_dim"]),
        "text_embedding.2": (width, width),
        "time_embedding.0": (width, config["freq_dim"]),
        "time_embedding.2": (width, width),
        "time_projection.1": (6 * width, width),
        "head.head": (config["out_channels"] * prod(patch), width),
    }
    shapes = {"patch_embedding.weight": (width, config["in_channels"], *patch), "patch_embedding.bias": (width,)}
    for block in (f"blocks.{number}" for number in range(config["num_layers"])):
        shapes |= {
            f"{block}.modulation": (1, 6, width),
            f"{block}.norm3.weight": (width,),
            f"{block}.norm3.bias": (width,),
        }
        linear |= {f"{block}.ffn.0": (ffn, width), f"{block}.ffn.2": (width, ffn)}
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            linear |= {f"{attention}.{name}": (width, width) for name in "qkvo"}
            shapes |= {f"{attention}.norm_{name}.weight": (width,) for name in "qk"}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {"head.modulation": (1, 2, width)}


def check_whole(original: Original, config: Mapping[str, Any]) -> None:
    """Refuse weights of which a tensor is missing, left over, or of another shape."""
    expected, tensors = list_shapes(config), original.tensors
    wrong = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tensor.shape} instead of {expected[name]}"
            for name, tensor in tensors.items()
            if tensor.shape != expected.get(name, tensor.shape)
        ],
    }
    report = "; ".join(f"{len(names)} {what}: {listed(names, 30)}" for what, names in wrong.items() if names)
    require(not report, "path", "a text-to-video Wan transformer", f"in {original.path} are {report}")
