# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One chunk as a fragment of an mp4: encoded by ffmpeg, cut out of its file, and given its place in another."""

import io
import struct
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

import numpy as np


TICKS = 1000  # of the track's clock for each tick of the frame rate


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


def mp4_boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int]]:
    """Kind and start of each box at the top of a file; the last one is b"cut" if it does not end at `end`."""
    start = 0
    while start < end:
        file.seek(start)
        length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        whole = length >= 8 and start + length <= end
        yield kind if whole else b"cut", start
        start = start + length if whole else end
