# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""An mp4 that grows chunk by chunk, plays up to its last chunk at any time, and can be cut back and gone on with.

The file is a fragmented mp4: `ftyp moov`, then `moof mdat` for each chunk. Each chunk is encoded by itself, from its
first frame to its last, so that the bytes do not depend on which process wrote the chunks before.
"""

import importlib
import io
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from ..tokentrim_checks import check, check_number


TICKS = 1000  # of the track's clock for each tick of the frame rate


class VideoWriter:
    r"""
    Appends chunks of frames to an mp4.

    The format is h264 in yuv420p, which every player decodes. That needs an even width and height: frames of odd width
    or height get one more column or row, a copy of the last one. `state` is a plain dict of what is in the file:
    `bytes`, `frames`, `chunks`, `fps` and `crf`; each chunk makes a new one.

    Args:
        path (`str` or `os.PathLike`): the file; what it held is lost.
        fps (`float`, defaults to `16`): frames per second; 16 is Wan's.
        crf (`float`, defaults to `16`): x264's quality, from 0 (best) to 51.

    Raises:
        `ImportError`: imageio-ffmpeg is not installed.
        `OSError`: the file cannot be made.
    """

    def __init__(self, path: str | os.PathLike, fps: float = 16, crf: float = 16):
        check_fps(fps)
        check_number("crf", crf, lambda crf: 0 <= crf <= 51, "a number from 0 to 51")
        self.go_on(path, {"bytes": 0, "frames": 0, "chunks": 0, "fps": fps, "crf": crf}, None)
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
        with open(path, "r+b") as file:
            size, chunks = os.fstat(file.fileno()).st_size, state["chunks"]
            if size < state["bytes"]:
                raise ValueError(
                    f"{path} holds {size} bytes, but held {state['bytes']} when the state was taken: it was damaged or "
                    "replaced."
                )
            boxes = list(mp4_boxes(file, state["bytes"]))
            if [kind for kind, _ in boxes] != [b"ftyp", b"moov"] * (chunks > 0) + [b"moof", b"mdat"] * chunks:
                raise ValueError(
                    f"{path} is not the file whose state was taken: it does not begin with {chunks} chunks."
                )
            file.truncate(state["bytes"])
            file.seek(0)
            header = file.read(boxes[2][1]) if chunks else None
        writer = cls.__new__(cls)
        writer.go_on(path, dict(state), header)
        return writer

    def go_on(self, path: str | os.PathLike, state: dict, header: bytes | None) -> None:
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
        self.header, self.size = header, size
        self.state = {
            **state,
            "bytes": state["bytes"] + len(added),
            "frames": state["frames"] + len(frames),
            "chunks": state["chunks"] + 1,
        }


class LineWriter:
    r"""
    Lines of text that grow with the video, with the same promises as [`VideoWriter`].

    Args:
        path (`str` or `os.PathLike`): the file; what it held is lost.

    `state` is a plain dict: `bytes`. Each line makes a new one.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.open("wb").close()
        self.state = {"bytes": 0}

    @classmethod
    def resume(cls, path: str | os.PathLike, state: dict) -> "LineWriter":
        """Go on with a file where its `state` was taken: what was written later is cut off."""
        size = os.path.getsize(path)
        if size < state["bytes"]:
            raise ValueError(f"{path} holds {size} bytes, but held {state['bytes']} when the state was taken.")
        os.truncate(path, state["bytes"])
        writer = cls.__new__(cls)
        writer.path, writer.state = Path(path), dict(state)
        return writer

    def write(self, line: str) -> None:
        """Append a line, all of it or nothing; raises `OSError` where the disk is full."""
        added = f"{line}\n".encode()
        append(self.path, self.state["bytes"], added)
        self.state = {"bytes": self.state["bytes"] + len(added)}


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
    path = Path(path)
    check(path.suffix.lower() == ".mp4", "path", str(path), "a file that ends with .mp4")
    starts = range(48, len(frames), 48) if chunk_frames is None else np.cumsum(chunk_frames)[:-1]
    unfinished = path.with_name(f".{path.name}.unfinished")
    writer = VideoWriter(unfinished, fps)
    try:
        for chunk in np.split(frames, starts):
            writer.write(chunk)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return path


def numbered(path: str | os.PathLike, video: int, num_videos: int) -> Path:
    """The file of one video of a batch: x.mp4, or x-0.mp4, x-1.mp4 where there are several."""
    path = Path(path)
    return path if num_videos == 1 else path.with_name(f"{path.stem}-{video}{path.suffix}")


def check_fps(fps: float) -> None:
    check_number("fps", fps, lambda fps: 0.01 <= fps <= 1000, "a number from 0.01 to 1000")


def frame_rate(fps: float) -> Fraction:
    """29.97 is 2997 / 100; a float of 24000 / 1001 is just that."""
    return Fraction(fps).limit_denominator(1001)


def encode_chunk(ffmpeg: str, frames: np.ndarray, fps: float, crf: float) -> bytes:
    """A whole mp4 of one fragment that begins with a keyframe. The same frames give the same bytes."""
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    _, height, width, _ = frames.shape
    rate = frame_rate(fps)
    scale = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp+bitexact"
    colors = f"{scale},format=yuv420p,setparams=color_primaries=bt709:color_trc=bt709"
    command = [ffmpeg, "-hide_banner", "-nostdin", "-loglevel", "error", "-threads", "1"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}"]
    command += ["-framerate", f"{rate.numerator}/{rate.denominator}", "-i", "pipe:0"]
    command += ["-vf", colors, "-filter_threads", "1"]
    command += ["-c:v", "libx264", "-preset", "veryfast", "-crf", str(crf), "-threads", "1"]
    command += ["-g", "1000000", "-sc_threshold", "0", "-bf", "0"]  # one group, whatever the number of frames
    command += ["-bsf:v", "filter_units=remove_types=6"]  # x264 would write its settings into each chunk
    command += ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1"]
    command += ["-video_track_timescale", str(rate.numerator * TICKS)]
    command += ["-movflags", "empty_moov+default_base_moof+skip_trailer", "-f", "mp4", "pipe:1"]
    # A session of its own: Ctrl-C is for this process, which may want to finish the chunk.
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True, start_new_session=True)
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise OSError(
            f"ffmpeg could not encode {len(frames)} frames of {width} x {height} (exit status {done.returncode}): "
            f"{reason[0]}"
        )
    return done.stdout


def split_header(encoded: bytes) -> tuple[bytes, bytearray]:
    """`ftyp moov` and `moof mdat` of a file of one fragment."""
    boxes = list(mp4_boxes(io.BytesIO(encoded), len(encoded)))
    kinds = [kind for kind, _ in boxes]
    if kinds != [b"ftyp", b"moov", b"moof", b"mdat"]:
        raise OSError(f"ffmpeg wrote {kinds} instead of a file of one fragment.")
    start = boxes[2][1]
    return encoded[:start], bytearray(encoded[start:])


def place_fragment(fragment: bytearray, number: int, ticks: int) -> bytearray:
    """With its number in the file, from 1, and the time of its first frame."""
    sequence, time = fragment.index(b"mfhd"), fragment.index(b"tfdt")  # kind, version and flags, value
    if fragment[time + 4] != 1:
        raise OSError("ffmpeg wrote a fragment whose time has 32 bits.")
    struct.pack_into(">I", fragment, sequence + 8, number + 1)
    struct.pack_into(">Q", fragment, time + 8, ticks)
    return fragment


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


def mp4_boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int]]:
    """Kind and start of each box at the top of a file; the last one is b"cut" if it does not end at `end`."""
    start = 0
    while start < end:
        file.seek(start)
        length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        whole = length >= 8 and start + length <= end
        yield kind if whole else b"cut", start
        start = start + length if whole else end


def optional(module: str, packages: str) -> ModuleType:
    """Import a module of a package that only looking at a run needs, by its name alone: whatever an import statement
    of these files names, Diffusers' loader imports and misses at every load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: `pip install {packages}`.") from error
