# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""From the chunks of a finished run to one output."""

from typing import Any

import torch

from ..tokentrim_frames.decode import decode_all
from ..tokentrim_frames.output import concatenated
from .host import Pipeline
from .plan import RolloutPlan
from .stream import Chunk, Stream


def gather(stream: Stream) -> list[Chunk]:
    """All chunks of a stream. If decoding fails, the exception's `latents` become those of all finished chunks."""
    chunks: list[Chunk] = []
    try:
        for chunk in stream:
            chunks.append(chunk)
    except Exception as error:
        if hasattr(error, "latents"):
            error.latents = torch.cat([*(chunk.latents for chunk in chunks), error.latents], dim=2)
        raise
    return chunks


def join_chunks(
    pipe: Pipeline, plan: RolloutPlan, chunks: list[Chunk]
) -> tuple[Any, list[list[dict]], list[int] | None]:
    """
    Put the chunks of a run together. Chunks without frames are decoded here.

    Returns:
        `tuple`: videos as `output_type` asks; decisions of each video; frames of each chunk, `None` for latents.
    """
    decisions = [[chunk.decisions[video] for chunk in chunks] for video in range(plan.sizes.num_videos)]
    chunk_frames = [plan.sizes.chunk_frames(chunk.index) for chunk in chunks]
    if chunks and chunks[0].frames is not None:
        return concatenated([chunk.frames for chunk in chunks]), decisions, chunk_frames
    num_videos, channels, *size = plan.sizes.frame_shape
    none = torch.zeros(num_videos, channels, 0, *size, dtype=torch.float32)
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2) if chunks else none
    if not plan.decodes:
        return latents, decisions, None
    return decode_all(pipe, latents, plan.output_type, sum(chunk_frames)), decisions, chunk_frames
