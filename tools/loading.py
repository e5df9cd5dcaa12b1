# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The one function by which the command loads a checkpoint. Code that lies in it runs only where that is asked for."""

from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
from accelerate import init_empty_weights

from ..pipeline_tokentrim import TokenTrimPipeline
from ..tokentrim_checks import check
from ..tokentrim_files.foreign import foreign_class
from ..tokentrim_files.loaders import FOREIGN_LOADERS
from .checkpoints import check_code, check_parts, download, find_checkpoint, read_json
from .component_sizes import check_components
from .names import INDEX


OFFLOADS = ("none", "model", "sequential", "group")


def load_checkpoint(
    checkpoint: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False, **components: Any
) -> TokenTrimPipeline:
    """
    A pipeline on the CPU, whose code is that of this package.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id, in Diffusers format.
        dtype (`torch.dtype`, *optional*): of the weights; by default float32.
        trust_remote_code (`bool`, defaults to `False`): whether code of its parts may run.
        components (*optional*): instead of the checkpoint's, `None` to leave one out.

    Raises:
        `ValueError`: there is no such checkpoint, or it needs code that is not trusted.
    """
    folder = find_checkpoint(str(checkpoint)) or download(str(checkpoint), trust_remote_code)
    check_code(folder, trust_remote_code)
    check_parts(folder)
    check_components("checkpoint", folder)
    for name, (library, kind) in list_classes(folder).items():
        # Transformers' Auto classes would ask on the terminal whether to run code.
        if name not in components and library == "transformers" and kind.startswith("Auto"):
            load = getattr(transformers, kind).from_pretrained
            components[name] = load(folder / name, trust_remote_code=trust_remote_code)
    return TokenTrimPipeline.from_pretrained(
        folder, dtype=dtype or torch.float32, trust_remote_code=trust_remote_code, local_files_only=True, **components
    )


def load_without_weights(checkpoint: str | Path) -> TokenTrimPipeline:
    """A checkpoint's pipeline whose weights are not there, to check the arguments of a call in a moment."""
    folder = find_checkpoint(str(checkpoint)) or download(str(checkpoint), False)
    check_code(folder, trust_remote_code=False)
    check_components("checkpoint", folder)
    models = {}
    with init_empty_weights():
        for name, (library, kind) in list_classes(folder).items():
            if name in ("transformer", "vae") and library == "diffusers":
                model = getattr(diffusers, kind)
                models[name] = model.from_config(model.load_config(folder / name, local_files_only=True))
            elif name == "text_encoder" and library == "transformers":
                config = transformers.AutoConfig.from_pretrained(folder / name, trust_remote_code=False)
                models[name] = getattr(transformers, kind)(config)
        if (foreign := foreign_class(read_json(folder / INDEX))) is not None:
            loader = FOREIGN_LOADERS[foreign]
            models["transformer"] = loader.from_config(
                loader.load_config(folder / "transformer", local_files_only=True)
            )
    return load_checkpoint(folder, **models)


def list_classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of each part of a checkpoint, where the library has such a class."""
    libraries = {"diffusers": diffusers, "transformers": transformers}
    classes = {}
    for name, value in read_json(folder / INDEX).items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value):
            if value[0] in libraries and hasattr(libraries[value[0]], value[1]):
                classes[name] = (value[0], value[1])
    return classes


def place(pipe: TokenTrimPipeline, device: torch.device, offload: str = "none") -> TokenTrimPipeline:
    """Move a pipeline to a device, at once or part by part while it runs."""
    check(offload == "none" or device.type != "cpu", "offload", offload, "'none' on a CPU")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")
    else:
        pipe.to(device)
    if device.type == "cpu":
        # The last bits of a matrix product depend on where in memory its weights begin: alike in every process.
        for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
            for weight in model.parameters() if model is not None else ():
                weight.data = weight.data.clone()
    return pipe


def find_device(device: str | None) -> torch.device:
    """
    The device that is asked for, or the accelerator, or the CPU.

    Raises:
        `ValueError`: this machine does not have it.
    """
    has_accelerator = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
    if device is None:
        return accelerator
    wanted = torch.device(device)
    count = torch.accelerator.device_count() if has_accelerator else 0
    exists = wanted.type == "cpu" or (wanted.type == accelerator.type and (wanted.index or 0) < count)
    known = ["cpu", *(f"{accelerator.type}:{number}" for number in range(count))]
    check(exists, "device", device, f"one of this machine's, {', '.join(known)}")
    return wanted


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
