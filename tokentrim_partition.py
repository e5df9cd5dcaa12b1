# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How a video's latent frames make chunks, and how many of them are given."""

from collections.abc import Sequence
from typing import Any

from .tokentrim_checks import check, check_int, check_list, check_tensor


def partition_chunks(
    num_frames: int | None,
    temporal_factor: int,
    num_frames_per_chunk: int | None,
    chunk_partition: Sequence[int] | None,
    checkpoint_partition: Sequence[int] | None = None,
) -> list[int]:
    """Latent frames of each chunk of a video of `num_frames` frames; of the first chunks, where it has no end.

    A checkpoint's own partition gives the size of the first chunk, which may be another, and of those that follow; the
    last one is what is left.
    """
    if num_frames_per_chunk is not None:
        check_int("num_frames_per_chunk", num_frames_per_chunk, 1)
    if num_frames is None:
        return _first_chunks(num_frames_per_chunk, chunk_partition, checkpoint_partition)
    check_int("num_frames", num_frames, 1)
    num_latent_frames, rest = divmod(num_frames - 1, temporal_factor)
    num_latent_frames += 1
    if chunk_partition is not None:
        check_list("chunk_partition", chunk_partition, int, "a list of ints")
        fits = min(chunk_partition, default=0) > 0 and not rest and sum(chunk_partition) == num_latent_frames
        valid = f"positive ints that sum to the {num_latent_frames} latent frames of num_frames={num_frames}"
        check(fits, "chunk_partition", chunk_partition, valid)
        return list(chunk_partition)
    if checkpoint_partition is not None:
        below = num_frames - rest
        valid = f"{temporal_factor}n + 1, such as {below} or {below + temporal_factor}"
        check(not rest, "num_frames", num_frames, valid)
        if num_frames_per_chunk is None and sum(checkpoint_partition) == num_latent_frames:
            return list(checkpoint_partition)
        first, size, *_ = [*checkpoint_partition, *checkpoint_partition]
        first, size = min(first, num_latent_frames), num_frames_per_chunk or size
        num_chunks, last = divmod(num_latent_frames - first, size)
        return [first] + [size] * num_chunks + [last] * (last > 0)
    num_chunks = max(num_latent_frames // num_frames_per_chunk, 1)
    below, above = ((n * num_frames_per_chunk - 1) * temporal_factor + 1 for n in (num_chunks, num_chunks + 1))
    valid = f"whole chunks of {num_frames_per_chunk} latent frames, such as {below} or {above}"
    check(not rest and num_latent_frames % num_frames_per_chunk == 0, "num_frames", num_frames, valid)
    return [num_frames_per_chunk] * num_chunks


def _first_chunks(
    num_frames_per_chunk: int | None,
    chunk_partition: Sequence[int] | None,
    checkpoint_partition: Sequence[int] | None,
) -> list[int]:
    """The chunks of a video without an end, of which the last repeats."""
    if chunk_partition is not None:
        check_list("chunk_partition", chunk_partition, int, "a list of ints")
        fits = min(chunk_partition, default=0) > 0
        check(fits, "chunk_partition", chunk_partition, "positive ints, of which the last repeats")
        return list(chunk_partition)
    if checkpoint_partition is not None:
        first, size, *_ = [*checkpoint_partition, *checkpoint_partition]
        return [first, num_frames_per_chunk or size]
    return [num_frames_per_chunk]


def count_given_chunks(
    pipe: Any, call: dict, frame_shape: Sequence[int], chunk_partition: Sequence[int], is_endless: bool
) -> int:
    """How many chunks the frames to continue fill: whole chunks, and at least one is left to generate."""
    num_videos, channels, height, width = frame_shape
    video, video_latents = call["video"], call["video_latents"]
    if video is not None:
        name, given, spatial = "video", video, (3, call["height"], call["width"])
        factor = pipe.vae_scale_factor_temporal
    elif video_latents is not None:
        name, given, spatial, factor = "video_latents", video_latents, (channels, height, width), 1
    else:
        return 0
    check(video is None or video_latents is None, "video_latents", video_latents, "None where `video` is given")
    layout = "(batch, frames, {}, {}, {})".format(*spatial)
    check_tensor(name, given, 5, layout)
    check(tuple(given.shape[2:]) == spatial, name, given, layout)
    check(num_videos % len(given) == 0, name, given, f"a batch that divides the {num_videos} videos")
    num_frames, rest = divmod(given.shape[1] - 1, factor)
    num_frames += 1
    if is_endless:
        chunk_partition = [*chunk_partition, *chunk_partition[-1:] * num_frames]
    ends = [sum(chunk_partition[: n + 1]) for n in range(len(chunk_partition) - 1)]
    valid = f"as many latent frames as fill whole chunks and leave one to generate: one of {ends}"
    check(not rest and num_frames in ends, name, given, valid)
    if video is not None and not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(f"`video` has to be in [0, 1], but is in [{video.min():.3g}, {video.max():.3g}].")
    return ends.index(num_frames) + 1
