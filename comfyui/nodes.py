# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Two nodes that call the package: one loads a checkpoint, the other generates a video chunk by chunk."""

import json
import os
from pathlib import Path
from typing import Any

import folder_paths  # ComfyUI's, like the next two
import torch
from comfy import model_management
from comfy.utils import ProgressBar
from PIL import Image

from .package import load_package


load_package()

from tokentrim.tokentrim_frames.mp4 import VideoWriter  # noqa: E402
from tokentrim.tokentrim_frames.output import as_uint8  # noqa: E402
from tokentrim.tools import names  # noqa: E402
from tokentrim.tools.checkpoints import check_parts, find_checkpoint  # noqa: E402
from tokentrim.tools.loading import OFFLOADS, load_checkpoint, place  # noqa: E402


OWN = "checkpoint"  # the choice that leaves an argument to the checkpoint
INDEX = "model_index.json"


def list_checkpoints() -> list[str]:
    """Folders in Diffusers format in ComfyUI's `models/diffusers`, by their names there."""
    found = []
    for search_path in map(Path, folder_paths.get_folder_paths("diffusers")):
        for folder, _, files in os.walk(search_path, followlinks=True):
            if INDEX in files:
                found.append(str(Path(folder).relative_to(search_path)))
    return sorted(found)


def find_folder(checkpoint: str) -> Path:
    """
    The folder that a name of `models/diffusers` or a path leads to.

    Raises:
        `ValueError`: there is none, or it is not in Diffusers format.
    """
    roots = [*map(Path, folder_paths.get_folder_paths("diffusers"))]
    if checkpoint.strip():
        for folder in (*(root / checkpoint for root in roots), Path(checkpoint).expanduser()):
            if folder.is_dir():
                find_checkpoint(str(folder))
                check_parts(folder)
                return folder
    known = ", ".join(list_checkpoints()) or "none there"
    raise ValueError(
        f"`checkpoint` must be a folder in Diffusers format, of {' or '.join(map(str, roots))} ({known}) or a path, but"
        f" is {checkpoint!r}."
    )


class LoadCheckpoint:
    """Loads a folder that `tokentrim convert` wrote, or that FastVideo or SGLang wrote."""

    CATEGORY = "TokenTrim"
    RETURN_TYPES, RETURN_NAMES = ("TOKENTRIM",), ("pipeline",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        found = list_checkpoints()
        return {
            "required": {
                "checkpoint": (
                    "STRING",
                    {"default": found[0] if found else "", "tooltip": "models/diffusers, or a path"},
                ),
                "dtype": (["auto", "bfloat16", "float16", "float32"],),
                "offload": (list(OFFLOADS),),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint: str) -> bool | str:
        try:
            find_folder(checkpoint)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    def load(self, checkpoint: str, dtype: str, offload: str) -> tuple[Any]:
        device = model_management.get_torch_device()
        if dtype == "auto":
            dtype = "float32" if device.type == "cpu" else "bfloat16"
        pipe = place(load_checkpoint(find_folder(checkpoint), getattr(torch, dtype)), device, offload)
        pipe.set_progress_bar_config(disable=True)
        return (pipe,)


class GenerateVideo:
    """Generates a video. The file grows with it and plays up to the last finished chunk; an interrupt leaves it there."""

    CATEGORY = "TokenTrim"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING", "STRING"), ("images", "path", "decisions")
    FUNCTION = "generate"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 4096, "step": 16, "tooltip": "0: the checkpoint's"}
        schedule = {"multiline": True, "default": "", "tooltip": 'later prompts by chunk, {"4": "a fox sits down"}'}
        return {
            "required": {
                "pipeline": ("TOKENTRIM",),
                "prompt": ("STRING", {"multiline": True, "default": "a red fox trots through snow"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10**6}),
                "method": ([OWN, *names.METHODS],),
                "layout": ([OWN, *names.LAYOUTS],),
                "height": ("INT", size),
                "width": ("INT", size),
                "filename_prefix": ("STRING", {"default": "video/TokenTrim"}),
            },
            "optional": {
                "prompt_schedule": ("STRING", schedule),
                "prompt_transition": ([OWN, *names.TRANSITIONS],),
            },
        }

    def generate(
        self, pipeline: Any, prompt: str, seed: int, num_frames: int, filename_prefix: str, **options: Any
    ) -> dict[str, Any]:
        call = {name: value for name, value in options.items() if value not in (OWN, "", 0)}
        if "prompt_schedule" in call:
            call["prompt_schedule"] = read_schedule(call["prompt_schedule"])
        call |= {"num_frames": num_frames, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}

        def stop_if_asked(*arguments: Any) -> dict:
            model_management.throw_exception_if_processing_interrupted()
            return {}

        chunks, decisions, writer = [], [], None
        with pipeline.stream(prompt, callback_on_step_end=stop_if_asked, **call) as stream:
            sizes = stream.run.sizes
            bar = ProgressBar(len(sizes.chunk_partition))
            path, shown = name_file(filename_prefix, sizes.width, sizes.height)
            for chunk in stream:
                frames = as_uint8(chunk.frames[0])
                writer = writer or VideoWriter(path, pipeline.fps)
                writer.write(frames)
                chunks.append(torch.from_numpy(chunk.frames[0]).float())
                decisions += chunk.decisions
                bar.update_absolute(chunk.index + 1, preview=("JPEG", Image.fromarray(frames[-1]), None))
        ui = {"images": [shown], "animated": (True,)}
        return {"ui": ui, "result": (torch.cat(chunks), str(path), json.dumps(decisions))}


def read_schedule(text: str) -> dict[int, str]:
    """
    Prompts by chunk, from JSON.

    Raises:
        `ValueError`: it is not a JSON object of prompts by chunk.
    """
    try:
        schedule = json.loads(text)
        return {int(chunk): prompt for chunk, prompt in schedule.items()}
    except (ValueError, AttributeError, TypeError) as error:
        valid = 'a JSON object of prompts by chunk, {"4": "a fox sits down"}'
        raise ValueError(f"`prompt_schedule` must be {valid}, but is {text!r:.80}.") from error


def name_file(prefix: str, width: int, height: int) -> tuple[Path, dict[str, str]]:
    """A new file in ComfyUI's output folder, and the entry that shows it on the page."""
    output = folder_paths.get_output_directory()
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    path = Path(folder) / f"{name}_{counter:05}_.mp4"
    return path, {"filename": path.name, "subfolder": subfolder, "type": "output"}
