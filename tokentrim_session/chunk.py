# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A finished chunk, as a stream yields it."""

from dataclasses import dataclass
from typing import Any

import torch

from ..tokentrim_frames.output import as_array, as_uint8
from ..tokentrim_frames.summary import as_page, tell_chunk, videos_as_html


@dataclass(frozen=True)
class Chunk:
    """A finished chunk.

    Args:
        index (`int`): which one.
        latents (`torch.Tensor`): (B, C, latent frames, H, W).
        decisions (`list[dict]`): one for each video.
        frames (*optional*): as `output_type` asks; `None` for `"latent"`.
        fps (`float`): frames per second that the model makes.
    """

    index: int
    latents: torch.Tensor
    decisions: list[dict]
    frames: Any = None
    fps: float = 16

    def __str__(self) -> str:
        return f"chunk {self.index}: {'; '.join(map(tell_chunk, self.decisions))}"

    def __repr__(self) -> str:
        return (
            f"<Chunk {self.index}, latents {tuple(self.latents.shape)}: {'; '.join(map(tell_chunk, self.decisions))}>"
        )

    def _repr_html_(self) -> str:
        """Its frames as videos, for notebooks."""
        shown = "" if self.frames is None else videos_as_html(as_uint8(as_array(self.frames)), self.fps)
        return as_page([str(self)], shown)
