# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How the latent frames of a video are divided into chunks, and how many of them are given."""

from collections.abc import Sequence
from typing import Any

from ..tokentrim_checks import check, check_int, check_list, check_tensor


MAX_FRAMES = 10_000_000  # a week at 16 frames per second


def count_latent_frames(num_frames: int, temporal_factor: int) -> int:
    """Latent frames that hold `num_frames` frames; the first latent frame is one frame."""
    return -(-(num_frames - 1) // temporal_factor) + 1


def partition_chunks(
    num_frames: int | None,
    temporal_factor: int,
    num_frames_per_chunk: int | None,
    chunk_partition: Sequence[int] | None,
    checkpoint_partition: Sequence[int] | None = None,
    num_given_frames: int = 0,
) -> list[int]:
    """
    Latent frames of each chunk.

    Args:
        num_frames (`int`, *optional*): frames of the video. Without an end, `None`, the last chunk size repeats.
        temporal_factor (`int`): frames of a latent frame.
        num_frames_per_chunk (`int`, *optional*): latent frames of a chunk. The last chunk may exceed the video's end.
        chunk_partition (`Sequence[int]`, *optional*): a given partition, which must fit `num_frames`.
        checkpoint_partition (`Sequence[int]`, *optional*):
            the partition of a checkpoint: the sizes of the first chunk and of the others. The last chunk may be
            shorter.
        num_given_frames (`int`):
            latent frames to continue. If they do not fill whole chunks, the first chunk is shorter.
    """
    if num_frames_per_chunk is not None:
        check_int("num_frames_per_chunk", num_frames_per_chunk, 1, maximum=MAX_FRAMES)
    if num_frames is not None:
        check_int("num_frames", num_frames, 1, ", or None in a stream, for a video without an end", MAX_FRAMES)
    num_latent_frames = None if num_frames is None else count_latent_frames(num_frames, temporal_factor)
    if chunk_partition is not None:
        return _given_partition(chunk_partition, num_frames, num_latent_frames)
    if checkpoint_partition is not None:
        return _checkpoint_partition(checkpoint_partition, num_frames_per_chunk, num_latent_frames)
    size = num_frames_per_chunk
    first = [num_given_frames % size] if num_given_frames % size else []
    if num_latent_frames is None:
        return [*first, size]
    return [*first, *[size] * -(-(num_latent_frames - sum(first)) // size)]


def _given_partition(chunk_partition: Any, num_frames: int | None, num_latent_frames: int | None) -> list[int]:
    check_list("chunk_partition", chunk_partition, int, "a list of ints")
    valid = "positive ints, of which the last repeats"
    if num_frames is not None:
        valid = f"positive ints that sum to the {num_latent_frames} latent frames of num_frames={num_frames}"
    fits = min(chunk_partition, default=0) > 0 and num_latent_frames in (None, sum(chunk_partition))
    check(fits, "chunk_partition", chunk_partition, valid)
    return list(chunk_partition)


def _checkpoint_partition(
    partition: Sequence[int], num_frames_per_chunk: int | None, num_latent_frames: int | None
) -> list[int]:
    if num_frames_per_chunk is None and sum(partition) == num_latent_frames:
        return list(partition)
    first, size, *_ = [*partition, *partition]
    size = num_frames_per_chunk or size
    if num_latent_frames is None:
        return [first, size]
    first = min(first, num_latent_frames)
    num_chunks, last = divmod(num_latent_frames - first, size)
    return [first] + [size] * num_chunks + [last] * (last > 0)


def count_frames(name: str, given: Any, shape: Sequence[int], factor: int) -> int:
    """
    Latent frames of the frames to continue.

    Args:
        name (`str`): the argument that gives them.
        given (`torch.Tensor`): frames or latent frames, (videos, T, C, H, W).
        shape (`Sequence[int]`): (B, C, H, W) of the call; one video may serve several of the B.
        factor (`int`): frames of a latent frame; the first latent frame is one frame.
    """
    num_videos, *frame = shape
    layout = "(batch, frames, {}, {}, {})".format(*frame)
    check_tensor(name, given, 5, layout)
    check(list(given.shape[2:]) == frame and given.shape[1] > 0, name, given, layout)
    check(num_videos % len(given) == 0, name, given, f"a batch that divides the {num_videos} videos")
    num_frames, rest = divmod(given.shape[1] - 1, factor)
    check(not rest, name, given, f"of {factor}n + 1 frames")
    return num_frames + 1


def count_given_chunks(name: str, num_given_frames: int, chunk_partition: Sequence[int], is_endless: bool) -> int:
    """How many chunks the latent frames to continue fill: whole chunks, and at least one is left to generate."""
    if num_given_frames == 0:
        return 0
    if is_endless:
        chunk_partition = [*chunk_partition, *chunk_partition[-1:] * num_given_frames]
    ends = [sum(chunk_partition[: n + 1]) for n in range(len(chunk_partition) - 1)]
    valid = f"as many latent frames as fill whole chunks and leave one to generate: {_listed(ends)}"
    check(num_given_frames in ends, name, num_given_frames, valid)
    return ends.index(num_given_frames) + 1


def _listed(ends: Sequence[int]) -> str:
    if not ends:
        return "none of a video of one chunk"
    return f"one of {list(ends[:8])}" if len(ends) <= 8 else f"one of {list(ends[:8])} and so on"
