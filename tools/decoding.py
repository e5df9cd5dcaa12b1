# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Frames of a video file, decoded by ffmpeg in a process that ends with its reader.

ffmpeg opens only formats that hold their own frames. Playlists and manifests, which name other files and addresses, are
refused whatever their name.
"""

import io
import logging
import re
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread, Timer

import numpy as np

from ..tokentrim_frames.pictures import MAX_PIXELS
from .mp4_tables import is_video_cut


logger = logging.getLogger("tokentrim.frames")
FORMATS = (
    "mov,matroska,avi,gif,mpegts,mpeg,flv,ogg,yuv4mpegpipe"  # ffmpeg's names; mov is mp4, matroska is mkv and webm
)
# Messages of ffmpeg about a file that ends too early. Its other errors also occur with complete files.
CUT = re.compile(r"partial file|ended prematurely|corrupt input packet|Packet corrupt|LZW decode failed")
RATE = r", ([\d.]+) fps,"
CLOCK = r"(\d+):(\d+):([\d.]+)"


def decode(path: Path, max_pixels: int, max_seconds: float | None = None) -> Iterator[np.ndarray]:
    """
    Frames of a video file as stored, uint8 (H, W, 3); no frame is repeated or dropped.

    Raises:
        `ImportError`: imageio-ffmpeg is not installed.
        `ValueError`: the file cannot be decoded, a frame has more than `max_pixels`, or reading takes longer than
            `max_seconds`.
    """
    process = start(path, max_pixels)
    messages, expired = Messages(process.stderr), []
    timer = Timer(max_seconds or 0, lambda: (expired.append(True), process.kill()))
    if max_seconds is not None:
        timer.start()
    count = 0
    try:
        while (frame := read_ppm(process.stdout)) is not None:
            count += 1
            yield frame
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        messages.close()
    if expired:
        raise ValueError(f"{path} was not read in {max_seconds:g} s, the limit here: after {count} frames.")
    if not count or messages.find("max pixel count"):
        raise ValueError(f"{path} cannot be decoded as a video: {messages.reason(max_pixels)}")
    messages.warn_if_cut(path, count)


def start(path: Path, max_pixels: int) -> subprocess.Popen:
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info"]
    command += ["-protocol_whitelist", "file", "-format_whitelist", FORMATS, "-max_pixels", str(max_pixels)]
    command += ["-threads", "2", "-i", f"file:{path.absolute()}", "-an", "-sn", "-dn"]
    # Without `passthrough`, ffmpeg repeats and drops frames to make the rate constant.
    command += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "pipe:1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def read_rate(path: Path) -> float | None:
    """Frames per second that a video file says of itself; `None` where it says nothing."""
    if not path.is_file():
        return None
    process = start(path, MAX_PIXELS)
    messages = Messages(process.stderr)
    read_ppm(process.stdout)  # by then ffmpeg has said it
    process.kill()
    process.wait()
    process.stdout.close()
    messages.close()
    rate = messages.find(RATE)
    return float(rate[1]) or None if rate else None


def read_ppm(stream: io.BufferedReader) -> np.ndarray | None:
    """The next picture of a stream; None at its end, or if it is cut."""
    with suppress(ValueError):
        magic, size, _ = (stream.readline() for _ in range(3))
        width, height = map(int, size.split())
        pixels = stream.read(3 * width * height)
        if magic == b"P6\n" and len(pixels) == 3 * width * height:
            return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    return None


class Messages:
    """The first and last lines of ffmpeg's messages, read by a thread, so that ffmpeg never waits."""

    def __init__(self, stream: io.BufferedReader):
        self.lines: list[str] = []
        self.last: deque[str] = deque(maxlen=100)
        self.stream = io.TextIOWrapper(stream, errors="replace")  # turns \r into line ends
        self.thread = Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.stream:
            (self.lines if len(self.lines) < 1000 else self.last).append(line.strip())

    def close(self) -> None:
        self.thread.join()
        self.stream.close()

    def find(self, pattern: str | re.Pattern) -> re.Match | None:
        """The last match of a pattern."""
        found = [match for line in (*self.lines, *self.last) if (match := re.search(pattern, line))]
        return found[-1] if found else None

    def reason(self, max_pixels: int) -> str:
        """The reason why a file cannot be decoded, in a few words."""
        if self.find("not on whitelist"):
            return f"it is in none of the formats {FORMATS.replace(',', ', ')}"
        if self.find("max pixel count"):
            return f"its pictures have more than {max_pixels / 1e6:.1f} million pixels, the limit here"
        if self.find(CUT):
            return "it ends before its first frame"
        errors = [line for line in (*self.lines, *self.last) if "[error]" in line or "[fatal]" in line]
        return re.sub(r"^(\[.*?\] )*", "", errors[0]) if errors else "it has no frames"

    def warn_if_cut(self, path: Path, count: int) -> None:
        """
        Warn about a file that ends too early, according to ffmpeg, its tables, or the length of the container.

        The length counts only for files without sound, because sound may be longer.
        """
        length, end, rate = (self.find(each) for each in (f"Duration: {CLOCK}", f"time={CLOCK}", RATE))
        ends_early, of = bool(self.find(CUT)) or is_video_cut(path), ""
        if length and end and not self.find(r"Stream #\S+ Audio"):
            length, end = (
                3600 * int(hours) + 60 * int(minutes) + float(rest)
                for hours, minutes, rest in (length.groups(), end.groups())
            )
            ends_early |= end < 0.9 * length
            expected = round(length * float(rate[1])) if rate else 0
            of = f" of about {expected}" if expected > count else ""
        if ends_early:
            logger.warning("%s ends after %d%s frames: is the file complete?", path, count, of)
