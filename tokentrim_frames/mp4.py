# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""An mp4 that grows chunk by chunk, plays up to its last chunk at any time, and can be cut back and gone on with.

The file is a fragmented mp4: `ftyp moov`, then `moof mdat` for each chunk. Each chunk is encoded by itself, from its
first frame to its last, so that the bytes do not depend on which process wrote the chunks before.
"""

import hashlib
import importlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..tokentrim_checks import check, check_number, plain
from ..tokentrim_writing import check_target, whole_file
from .fragments import TICKS, encode_chunk, frame_rate, mp4_boxes, place_fragment, split_header


FPS = 16  # frames per second where a checkpoint says nothing: Wan's
VIDEO_ENDINGS = (".mp4",)


class VideoWriter:
    r"""
    Appends chunks of frames to an mp4.

    The format is h264 in yuv420p, which every player decodes. That needs an even width and height: frames of odd width
    or height get one more column or row, a copy of the last one. `state` is a plain dict of what is in the file:
    `bytes` and their `sha256`, `frames`, `chunks`, `fps` and `crf`; each chunk makes a new one.

    Args:
        path (`str` or `os.PathLike`): the file; what it held is lost.
        fps (`float`, defaults to `16`): frames per second.
        crf (`float`, defaults to `16`): x264's quality, from 0 (best) to 51.

    Raises:
        `ImportError`: imageio-ffmpeg is not installed.
        `OSError`: the file cannot be made.
    """

    def __init__(self, path: str | os.PathLike, fps: float = FPS, crf: float = 16):
        fps, crf = plain(fps), plain(crf)
        check_fps(fps)
        check_number("crf", crf, lambda crf: 0 <= crf <= 51, "a number from 0 to 51")
        digest = hashlib.sha256()
        state = {"bytes": 0, "sha256": digest.hexdigest(), "frames": 0, "chunks": 0, "fps": fps, "crf": crf}
        self.go_on(path, state, None, digest)
        self.path.open("wb").close()

    @classmethod
    def resume(cls, path: str | os.PathLike, state: dict) -> "VideoWriter":
        r"""
        Go on with a file where its `state` was taken: what was written later is cut off.

        Args:
            path (`str` or `os.PathLike`): the file, or a copy.
            state (`dict`): `state` of the writer of the file.

        Raises:
            `FileNotFoundError`: the file is gone.
            `ValueError`: the file is shorter than the state says, or another one.
        """
        check_length(path, state)
        with open(path, "r+b") as file:
            chunks = state["chunks"]
            boxes = list(mp4_boxes(file, state["bytes"]))
            if [kind for kind, _ in boxes] != [b"ftyp", b"moov"] * (chunks > 0) + [b"moof", b"mdat"] * chunks:
                raise ValueError(
                    f"{path} is not the file whose state was taken: it does not begin with {chunks} chunks."
                )
            digest = check_beginning(path, state)
            file.truncate(state["bytes"])
            file.seek(0)
            header = file.read(boxes[2][1]) if chunks else None
        writer = cls.__new__(cls)
        writer.go_on(path, dict(state), header, digest)
        return writer

    def go_on(self, path: str | os.PathLike, state: dict, header: bytes | None, digest: Any) -> None:
        self.digest = digest  # of what is in the file
        self.ffmpeg = optional("imageio_ffmpeg", "imageio-ffmpeg").get_ffmpeg_exe()
        self.path = Path(path)
        self.state = state
        self.header = header  # ftyp and moov, once a chunk is written
        self.size = None  # (H, W) of the frames, once this writer has written some

    def write(self, frames: np.ndarray) -> None:
        r"""
        Append a chunk. It is on the disk when this returns; if it raises, the file ends with the chunk before.

        Args:
            frames (`np.ndarray`): uint8 (T, H, W, 3), T > 0.

        Raises:
            `OSError`: ffmpeg fails, the disk is full, or the file was cut or removed meanwhile.
            `ValueError`: the frames are of another size than those before.
        """
        check(isinstance(frames, np.ndarray), "frames", type(frames).__name__, "a numpy array", TypeError)
        shape_and_dtype = f"{frames.dtype} {frames.shape}"
        is_video = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size > 0
        check(is_video, "frames", shape_and_dtype, "uint8 (T, H, W, 3) with T > 0")
        size = frames.shape[1:3]
        check(self.size in (None, size), "frames", shape_and_dtype, f"of the size {self.size} of those before")
        state = self.state
        header, fragment = split_header(encode_chunk(self.ffmpeg, frames, state["fps"], state["crf"]))
        if header != (self.header or header):
            raise OSError(
                f"The chunk does not fit the beginning of {self.path}: frames of another size, or another ffmpeg."
            )
        (num_frames,) = struct.unpack_from(">I", fragment, fragment.index(b"trun") + 8)
        if num_frames != len(frames):
            raise OSError(f"ffmpeg encoded {num_frames} frames instead of {len(frames)}.")
        rate = frame_rate(state["fps"])
        fragment = place_fragment(fragment, state["chunks"], state["frames"] * rate.denominator * TICKS)
        added = fragment if self.header else header + fragment
        append(self.path, state["bytes"], added)
        self.digest.update(added)
        self.header, self.size = header, size
        self.state = {
            **state,
            "bytes": state["bytes"] + len(added),
            "sha256": self.digest.hexdigest(),
            "frames": state["frames"] + len(frames),
            "chunks": state["chunks"] + 1,
        }


class LineWriter:
    r"""
    Lines of text that grow with the video, with the same promises as [`VideoWriter`].

    Args:
        path (`str` or `os.PathLike`): the file; what it held is lost.

    `state` is a plain dict: `bytes` and their `sha256`. Each line makes a new one.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.open("wb").close()
        self.digest = hashlib.sha256()
        self.state = {"bytes": 0, "sha256": self.digest.hexdigest()}

    @classmethod
    def resume(cls, path: str | os.PathLike, state: dict) -> "LineWriter":
        """Go on with a file where its `state` was taken: what was written later is cut off."""
        check_length(path, state)
        digest = check_beginning(path, state)
        os.truncate(path, state["bytes"])
        writer = cls.__new__(cls)
        writer.path, writer.state, writer.digest = Path(path), dict(state), digest
        return writer

    def write(self, line: str) -> None:
        """Append a line, all of it or nothing; raises `OSError` where the disk is full."""
        added = f"{line}\n".encode()
        append(self.path, self.state["bytes"], added)
        self.digest.update(added)
        self.state = {"bytes": self.state["bytes"] + len(added), "sha256": self.digest.hexdigest()}


def check_length(path: str | os.PathLike, state: dict) -> None:
    size, expected = os.path.getsize(path), state["bytes"]
    if size < expected:
        raise ValueError(
            f"{path} holds {size} bytes, but held {expected} when the state was taken: it was damaged or replaced."
        )


def check_beginning(path: str | os.PathLike, state: dict) -> Any:
    """The digest of a file up to where its `state` was taken; `ValueError` if it does not begin as it did then."""
    digest, left = hashlib.sha256(), state["bytes"]
    with open(path, "rb") as file:
        while part := file.read(min(left, 2**20)):
            digest.update(part)
            left -= len(part)
    if state.get("sha256", digest.hexdigest()) != digest.hexdigest():  # states of before have none
        raise ValueError(f"{path} is not the file whose state was taken: it begins with other bytes.")
    return digest


def save_video(
    path: str | os.PathLike, frames: np.ndarray, fps: float, chunk_frames: Sequence[int] | None = None
) -> Path:
    """
    Write a video as mp4, whole or not at all.

    Args:
        path (`str` or `os.PathLike`): the file, `x.mp4`.
        frames (`np.ndarray`): uint8 (T, H, W, 3).
        fps (`float`): frames per second.
        chunk_frames (`Sequence[int]`, *optional*): frames of each chunk; a player can jump to its first one.
    """
    path = check_target("path", path, VIDEO_ENDINGS)
    starts = range(48, len(frames), 48) if chunk_frames is None else np.cumsum(chunk_frames)[:-1]
    with whole_file(path) as unfinished:
        writer = VideoWriter(unfinished, fps)
        for chunk in np.split(frames, starts):
            writer.write(chunk)
    return path


def check_fps(fps: float) -> None:
    check_number("fps", plain(fps), lambda fps: 0.01 <= fps <= 1000, "a number from 0.01 to 1000")


def append(path: Path, size: int, added: bytes) -> None:
    """At `size`, to the disk; all of it, or nothing."""
    now = os.path.getsize(path)
    if now < size:
        raise OSError(
            f"{path} held {size} bytes when it was last written, but holds {now} now: something else cut it."
        )
    try:
        with open(path, "r+b", buffering=0) as file:
            file.truncate(size)
            file.seek(size)
            try:
                left = memoryview(added)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"The next chunk ({len(added)} bytes) could not be written, the file ends with the chunk before: "
            f"{error.strerror}",
            str(path),
        ) from error


def optional(module: str, packages: str) -> ModuleType:
    """Import a module of a package that only looking at a run needs, by its name alone: whatever an import statement
    of these files names, Diffusers' loader imports and misses at every load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: `pip install {packages}`.") from error
