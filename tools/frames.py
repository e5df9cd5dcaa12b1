# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Frames of video files and of folders of pictures, one at a time."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from ..tokentrim_frames.pictures import MAX_PIXELS, PICTURE_ERRORS, PICTURE_FORMATS, as_rgb, check_size, open_picture
from .decoding import decode
from .targets import PLOT_MARK


VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Limits:
    """What reading a video may take; what is more is refused.

    Args:
        pixels (`int`): of a frame.
        frames (`int`, *optional*): of the video.
        seconds (`float`, *optional*): of reading, including the work on each frame.
    """

    pixels: int = MAX_PIXELS
    frames: int | None = None
    seconds: float | None = None


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """
    The videos that paths name: a file, a folder of pictures (one video), or a folder of both of these. Loose pictures
    beside videos, and names that begin with a dot, are ignored.

    Raises:
        `ValueError`: a path does not exist or holds no video.
    """
    videos = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist.")
        if path.is_file():
            videos.append(path)
            continue
        if not path.is_dir():
            raise ValueError(f"{path} is neither a file nor a folder.")
        inside = [each for each in sorted(path.iterdir()) if is_video(each)]
        if not inside and list_pictures(path):
            inside = [path]
        if not inside:
            raise ValueError(f"{path} holds no video: no file ending in {', '.join(VIDEOS)}, and no pictures.")
        videos += inside
    return videos


def is_video(path: Path) -> bool:
    """Whether a path in a folder is a video: a video file or a folder of pictures, not hidden."""
    if path.name.startswith("."):
        return False
    return bool(list_pictures(path)) if path.is_dir() else path.is_file() and path.suffix.lower() in VIDEOS


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, by the numbers in their names: 2.png comes before 10.png. Empty for a file."""
    if not folder.is_dir():
        return []
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    pictures = [path for path in pictures if path.is_file() and not is_plot(path)]
    return sorted(pictures, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


def is_plot(path: Path) -> bool:
    """Whether a picture is a figure of `tokentrim drift`, written into the folder that it measured."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".png" and PLOT_MARK.encode() in file.read(512)


def read_frames(path: Path, limits: Limits = Limits()) -> Iterator[np.ndarray]:
    """
    Frames of a video, uint8 (H, W, 3), each as often as it is stored; one is in memory at a time. Close the iterator to
    end the process that decodes.

    Raises:
        `ImportError`: imageio-ffmpeg is not installed.
        `ValueError`: the video cannot be decoded, goes beyond a limit, or its pictures differ in size.
    """
    if path.is_dir():
        frames = read_pictures(list_pictures(path), limits.pixels)
    elif path.suffix.lower() in PICTURES:
        frames = read_animation(path, limits.pixels)
    else:
        frames = decode(path, limits.pixels, limits.seconds)
    start = time.monotonic()
    with closing(frames):
        for count, frame in enumerate(frames):
            if limits.frames is not None and count >= limits.frames:
                raise ValueError(f"{path} has more than {limits.frames:,} frames, the limit here.")
            if limits.seconds is not None and time.monotonic() - start > limits.seconds:
                raise ValueError(f"{path} was not read in {limits.seconds:g} s, the limit here: after {count} frames.")
            yield frame


def crop_top(frames: Iterator[np.ndarray], top: float) -> Iterator[np.ndarray]:
    """The top of each frame, as a share of its height: where the rest is meant to change, as the ground under a sky."""
    for frame in frames:
        yield frame[: max(round(top * len(frame)), 1)]


def read_pictures(paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    size = None
    for path in paths:
        frame = np.asarray(open_picture(path, max_pixels))
        size = size or frame.shape
        if frame.shape != size:
            raise ValueError(
                f"{path} is {frame.shape[1]} x {frame.shape[0]}, the pictures before it {size[1]} x {size[0]}."
            )
        yield frame


def read_animation(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """The frames of an animated WebP or PNG."""
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            check_size(path, picture, max_pixels)
            for frame in ImageSequence.Iterator(picture):
                yield np.asarray(as_rgb(frame))
    except PICTURE_ERRORS as error:
        raise ValueError(f"{path} is no complete picture in {', '.join(PICTURE_FORMATS)} format: {error}") from error
