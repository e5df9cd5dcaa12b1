# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim in ComfyUI: link this folder into `custom_nodes`."""

from .nodes import GenerateVideo, LoadCheckpoint


NODE_CLASS_MAPPINGS = {"TokenTrimLoadCheckpoint": LoadCheckpoint, "TokenTrimGenerateVideo": GenerateVideo}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TokenTrimLoadCheckpoint": "TokenTrim: Load Causal Wan",
    "TokenTrimGenerateVideo": "TokenTrim: Generate Video",
}
