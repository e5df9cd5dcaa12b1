# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Frames of video files and of folders of pictures, one at a time."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


logger = logging.getLogger("tokentrim.frames")
VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """
    The videos that paths name: a file, a folder of pictures (one video), or a folder of both of these.

    Raises:
        `ValueError`: a path does not exist or holds no video.
    """
    videos = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist.")
        if path.is_file() or list_pictures(path):
            videos.append(path)
            continue
        inside = [each for each in sorted(path.iterdir()) if each.suffix.lower() in VIDEOS or list_pictures(each)]
        if not inside:
            raise ValueError(f"{path} holds no video: no file ending in {', '.join(VIDEOS)}, and no pictures.")
        videos += inside
    return videos


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, by the numbers in their names: 2.png comes before 10.png. Empty for a file."""
    if not folder.is_dir():
        return []
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    return sorted(pictures, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """
    Frames of a video, uint8 (H, W, 3), each as often as it is stored; one is in memory at a time.

    Raises:
        `ImportError`: imageio-ffmpeg is not installed.
        `ValueError`: the video cannot be decoded, or its pictures differ in size.
    """
    return read_pictures(list_pictures(path)) if path.is_dir() else decode(path)


def read_pictures(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    size = None
    for path in paths:
        try:
            frame = np.asarray(Image.open(path).convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path} is no complete picture: {error}") from error
        size = size or frame.shape
        if frame.shape != size:
            raise ValueError(
                f"{path} is {frame.shape[1]} x {frame.shape[0]}, the pictures before it {size[1]} x {size[0]}."
            )
        yield frame


def decode(path: Path) -> Iterator[np.ndarray]:
    import imageio_ffmpeg

    # Without `passthrough`, ffmpeg repeats and drops frames to make the rate constant.
    frames = imageio_ffmpeg.read_frames(path.absolute(), output_params=["-fps_mode", "passthrough"])
    count = 0
    try:
        header = next(frames)
        width, height = header["size"]
        for count, frame in enumerate(frames, 1):
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, StopIteration, KeyError, IndexError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ValueError(f"{path} cannot be decoded as a video: {reason[0]}") from error
    expected = header["duration"] * header["fps"]
    if count < 0.9 * expected:
        logger.warning("%s ends after %d of about %d frames: is the file complete?", path, count, expected)
