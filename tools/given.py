# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pictures and videos that `tokentrim generate` begins with, as the pipeline takes them."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..tokentrim_frames.pictures import open_picture
from .frames import read_frames
from .jobs import Job


NUM_LATENT_FRAMES = 9  # of a video to continue, at most


def read_given(pipe: Any, job: Job) -> dict[str, Any]:
    """
    `image` and `video` of a call, from the files of a job, scaled and cropped to the size of its video.

    Raises:
        `ValueError`: a file is no picture or no video.
    """
    size = tuple(
        job.settings.get(name) or pipe.config.get(name) or default
        for name, default in (("width", 832), ("height", 480))
    )
    given = {}
    for name, path in job.given:
        if name == "image":
            given[name] = ImageOps.fit(open_picture(path), size, Image.Resampling.LANCZOS)
        else:
            given[name] = read_end(path, size, pipe.vae_scale_factor_temporal)
    return given


def read_end(path: Path, size: tuple[int, int], temporal_factor: int) -> list[Image.Image]:
    """The last frames of a video, as many as whole latent frames have, up to `NUM_LATENT_FRAMES` of them."""
    frames = deque(read_frames(path), maxlen=(NUM_LATENT_FRAMES - 1) * temporal_factor + 1)
    if not frames:
        raise ValueError(f"--video: {path} has no frames.")
    num_frames = (len(frames) - 1) // temporal_factor * temporal_factor + 1
    last = list(frames)[-num_frames:]
    return [ImageOps.fit(Image.fromarray(np.asarray(frame)), size, Image.Resampling.LANCZOS) for frame in last]
