# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint says of itself, from its JSON files and headers, before PyTorch is imported or a model is loaded."""

import json
import os
import re
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..tokentrim_files.foreign import folder_settings
from .component_sizes import check_components
from .headers import TensorInfo, read_header
from .names import FPS, INDEX
from .numbers import FPS as RATES
from .tensor_info import load_json


PARTS = ("transformer", "text_encoder", "vae")  # that have weights
WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx")  # that are not downloaded: safetensors are


def find_checkpoint(checkpoint: str) -> Path | None:
    """
    The folder of a checkpoint; `None` for a Hub id whose index could be read, so that the rest can be downloaded.

    Raises:
        `OSError`: the Hub cannot be reached.
        `ValueError`: it is neither a folder with an index nor a Hub id.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        check_folder(path)
        return path
    siblings = [each for each in path.parent.glob("*") if (each / INDEX).is_file()] if "/" in checkpoint else []
    if siblings or not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) or checkpoint[0] == ".":
        close = get_close_matches(path.name, [each.name for each in siblings], 1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise ValueError(
            f"`checkpoint` must be a folder or a Hub id, you/name, but {checkpoint} does not exist.{hint}"
        )
    find_index(checkpoint)
    return None


def check_folder(folder: Path) -> None:
    """Refuse what is not a folder in Diffusers format."""
    if not (folder / INDEX).is_file():
        valid = f"a folder in Diffusers format, with a {INDEX}"
        raise ValueError(
            f"`checkpoint` must be {valid}, but {folder} {'has none' if folder.is_dir() else 'does not exist'}."
        )
    read_json(folder / INDEX)


def find_index(repo_id: str) -> Path:
    """The index of a repository on the Hub, from the cache or downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, INDEX))
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the Hub cannot be reached"
        raise OSError(f"`checkpoint`: {repo_id} is neither a folder nor in the cache, and {reason}.") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(f"`checkpoint`: {repo_id} is not a folder, and not a model on the Hub: {reason}") from error


def download(repo_id: str, with_code: bool) -> Path:
    """The folder of a model on the Hub: its index, and the files of its parts; Python files only where they may run."""
    from huggingface_hub import snapshot_download

    index = read_json(find_index(repo_id))
    parts = [f"{name}/*" for name, value in index.items() if isinstance(value, list)]
    ignored = [*WEIGHTS, *([] if with_code else ["*.py"])]
    return Path(snapshot_download(repo_id, allow_patterns=[INDEX, *parts], ignore_patterns=ignored))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `ValueError` with a sentence where the file holds something else."""
    try:
        content = load_json(path.read_bytes())
    except (EOFError, OSError) as error:
        raise ValueError(f"`checkpoint`: {path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`checkpoint`: {path} must hold one JSON object.")
    return content


def read_rollout(folder: Path) -> dict[str, Any]:
    """A checkpoint's index, with the rollout settings that another program wrote into its transformer's config."""
    index, config = read_json(folder / INDEX), folder / "transformer" / "config.json"
    settings = folder_settings(index, read_json(config) if config.is_file() else {})
    return {**index, **{name: value for name, value in settings.items() if index.get(name) is None}}


def check_code(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a checkpoint that needs code that lies in it, unless that code is trusted."""
    found = [] if trust_remote_code else list_code(folder)
    if found:
        raise ValueError(
            f"`checkpoint`: {folder} needs code of its own, {', '.join(found)}, which could do anything. Read it; "
            "--trust-remote-code runs it."
        )


def list_code(folder: Path) -> list[str]:
    """The files of a checkpoint's parts that would run, or that name code which would. Its pipeline's code never runs."""
    index, found = read_json(folder / INDEX), []
    for name, value in index.items():
        if not isinstance(value, list) or not (folder / name).is_dir():
            continue
        if value and isinstance(value[0], str) and (folder / name / f"{value[0]}.py").is_file():
            found.append(f"{name}/{value[0]}.py")
        configs = sorted((folder / name).glob("*config.json"))
        found += [f"{name}/{path.name} (auto_map)" for path in configs if '"auto_map"' in json.dumps(read_json(path))]
    return found


def check_parts(folder: Path) -> None:
    """Refuse a checkpoint without a transformer or a scheduler."""
    index = read_json(folder / INDEX)
    for name in ("transformer", "scheduler"):
        value = index.get(name)
        if not isinstance(value, list) or len(value) != 2 or not (folder / name).is_dir():
            raise ValueError(f"`checkpoint` must be a folder of a causal Wan model, but {folder} has no {name}.")


class Geometry(NamedTuple):
    """What a checkpoint's configs say of tokens and of the keys that a run holds."""

    rows: int  # pixels of a token's height and width
    columns: int
    values: int  # keys of a token, in all layers


def read_geometry(folder: Path) -> Geometry:
    """
    The sizes of a checkpoint's tokens.

    Raises:
        `ValueError`: a config is damaged, or has no such sizes.
    """
    check_components("checkpoint", folder)
    path, vae = folder / "transformer" / "config.json", folder / "vae" / "config.json"
    config = read_json(path)
    patch = config.get("patch_size", [1, 2, 2])
    spatial = read_json(vae).get("scale_factor_spatial", 8) if vae.is_file() else 8
    sizes = [config.get(name) for name in ("num_layers", "num_attention_heads", "attention_head_dim")]
    for size in (*sizes, spatial, *(patch if isinstance(patch, list) and len(patch) == 3 else [None])):
        if type(size) is not int or size < 1:
            raise ValueError(
                f"`checkpoint` must be a folder of a Wan model, but {path} has other sizes: {size!r:.60}."
            )
    return Geometry(spatial * patch[1], spatial * patch[2], prod(sizes))


def check_size(folder: Path, settings: dict) -> None:
    """Refuse a height or a width that does not divide into tokens."""
    geometry = read_geometry(folder)
    for name, step in (("height", geometry.rows), ("width", geometry.columns)):
        if settings.get(name) is not None and settings[name] % step:
            raise ValueError(f"`{name}` must be a multiple of {step} for {folder}, but is {settings[name]}.")


def read_fps(folder: Path) -> float:
    """Frames per second of a checkpoint's videos."""
    fps = read_json(folder / INDEX).get("fps")
    if fps is not None:
        RATES.check("fps", fps)
    return fps or FPS


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters of each part, as far as there are headers of safetensors."""
    counts = {}
    for name in PARTS:
        if (folder / name).is_dir() and any((folder / name).glob("*.safetensors")):
            tensors = read_header(folder / name).values()
            counts[name] = sum(prod(tensor.shape) for tensor in tensors if isinstance(tensor, TensorInfo))
    return counts
