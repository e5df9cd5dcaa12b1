# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Whether an mp4 or mov file was cut, from its tables: ffmpeg does not report a cut in the sound."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


TABLE = (b"mdia", b"minf", b"stbl")
MAX_BOXES = 10_000  # beside each other


def is_video_cut(path: Path) -> bool:
    """Whether frames of a file lie beyond its end. False for other formats, and for files without these tables."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        try:
            for start, end in find_boxes(file, 0, size, b"moov", b"trak"):
                if any(
                    read_at(file, handler + 8, 4) == b"vide"
                    for handler, _ in find_boxes(file, start, end, b"mdia", b"hdlr")
                ):
                    return last_offset(file, start, end) >= size
        except struct.error:
            pass
    return False


def last_offset(file: BinaryIO, start: int, end: int) -> int:
    """The start of the last chunk of samples of a track; -1 without samples."""
    last = -1
    for kind, form in ((b"stco", ">I"), (b"co64", ">Q")):
        width = struct.calcsize(form)
        for first, behind in find_boxes(file, start, end, *TABLE, kind):
            (count,) = struct.unpack(">I", read_at(file, first + 4, 4))
            if count and first + 8 + count * width <= behind:
                position = first + 8 + (count - 1) * width
                last = max(last, *struct.unpack(form, read_at(file, position, width)))
    return last


def find_boxes(file: BinaryIO, start: int, end: int, *kinds: bytes) -> Iterator[tuple[int, int]]:
    """First and last position of the content of every box along a path of kinds."""
    if not kinds:
        yield start, end
        return
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        length, kind = struct.unpack(">I4s", read_at(file, start, 8))
        header = 8
        if length == 1:
            (length,), header = struct.unpack(">Q", read_at(file, start + 8, 8)), 16
        length = length or end - start
        if length < header:
            return
        if kind == kinds[0]:
            yield from find_boxes(file, start + header, min(start + length, end), *kinds[1:])
        start += length


def read_at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
