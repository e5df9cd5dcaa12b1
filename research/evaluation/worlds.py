# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The worlds of the checkpoints: any number of prompts, and true videos of a prompt."""

from types import ModuleType

import numpy as np
import torch

from research.training import photographs, travelling, world


WORLDS = {  # by folder of checkpoints/
    "tiny-world": world,
    "tiny-world-self-forced": world,
    "travelling-world": travelling,
    "photographs": photographs,
}


STILL_ROWS = {travelling: slice(1, 12)}  # the sky: it never changes in a true video, except for a sun or moon in some


def render_chunks(of: ModuleType, prompt: str, seed: int, num_chunks: int, num_frames_per_chunk: int) -> np.ndarray:
    """The middle frame of each chunk of a true video, and the one after it: uint8 (chunks, 2, H, W, 3)."""
    scene, middle = of.parse(prompt), num_frames_per_chunk // 2
    hidden = of.HIDDEN.sample(scene, torch.Generator().manual_seed(seed))
    starts = range(middle, middle + num_chunks * num_frames_per_chunk, num_frames_per_chunk)
    frames = torch.stack([of.render(scene, hidden, 2, start) for start in starts])
    return (frames.permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8).numpy()
