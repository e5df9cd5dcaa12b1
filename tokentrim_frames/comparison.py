# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Rollouts side by side: a labeled video, an animated WebP, a film strip, a plot of drift, and a line for each."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..tokentrim_checks import check, check_int
from .colors import color_drift, end_of
from .mp4 import optional, save_video
from .output import FPS, as_uint8, decision_event, plot_severity
from .summary import as_page, count_events, figure_as_html, videos_as_html


SIDE = 288  # pixels of a picture's shorter side, at least
INK, PAPER = (32, 33, 36), (255, 255, 255)
LINES = ("#c2570c", "#2563eb", "#15803d", "#7b3294")  # of the first methods in plots


class Comparison:
    """
    Some rollouts of one prompt and noise, side by side: `print(comparison)` has a line for each.

    Args:
        outputs (`dict[str, TokenTrimPipelineOutput]`): by name; all with frames, and as many of the same size.
        video (`int`, defaults to `0`): which video of each batch.
        top (`float`, defaults to `1.0`):
            Share of the height, from the top, whose colors are compared: below 1 where the rest is meant to change, as the
            ground under a sky does when the camera travels.

    Raises:
        `ValueError`: no output, videos that are latents, or of different lengths or sizes.
    """

    def __init__(self, outputs: dict[str, Any], video: int = 0, top: float = 1.0):
        check(bool(outputs), "outputs", outputs, "a dict of at least one output, by name")
        self.videos = {name: as_uint8(output.as_array()[video]) for name, output in outputs.items()}
        shapes = {video.shape for video in self.videos.values()}
        check(len(shapes) == 1, "outputs", shapes, "of videos that are equally long and large")
        self.decisions = {name: output.decisions[video] for name, output in outputs.items()}
        first = next(iter(outputs.values()))
        self.part = "colors" if top == 1 else f"colors of the top {top:.0%}"
        self.chunk_frames, self.fps = first.chunk_frames, first.fps or FPS
        self.drifts = {name: color_drift(video, self.chunk_frames, top) for name, video in self.videos.items()}

    def __str__(self) -> str:
        width, num_chunks = max(map(len, self.videos)), len(self.chunk_frames)
        lines = []
        for name, drift in self.drifts.items():
            counts = count_events(self.decisions[name])
            done = [f"{event} {counts[event]} of {num_chunks} chunks" for event in sorted(counts) if counts[event]]
            told = ", ".join(done) or "changed nothing"
            lines.append(f"{name:{width}}  {self.part} end {end_of(drift):4.1f} away from the start; {told}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The video, the lines and the plot, for notebooks."""
        video = videos_as_html(self.side_by_side()[None], self.fps, self.chunk_frames)
        return as_page(str(self).splitlines(), video, figure_as_html(self.plot_drift()))

    def side_by_side(self, side: int = SIDE) -> np.ndarray:
        """
        One video with a labeled column for each rollout.

        Args:
            side (`int`, defaults to `288`): pixels of a picture's shorter side, at least.

        Returns:
            `np.ndarray`: uint8 (frames, H, W, 3).
        """
        return np.stack([self.picture(frame, side) for frame in range(sum(self.chunk_frames))])

    def picture(self, frame: int, side: int = SIDE) -> np.ndarray:
        """One frame of [`side_by_side`], uint8 (H, W, 3)."""
        check_int("side", side, 1)
        return beside([labeled(enlarged(video[frame], side), name) for name, video in self.videos.items()])

    def save_video(self, path: str | os.PathLike, side: int = SIDE) -> Path:
        """Write [`side_by_side`] as mp4; the file appears when it is complete."""
        return save_video(path, self.side_by_side(side), self.fps)

    def save_webp(self, path: str | os.PathLike, side: int = 192, every: int = 3, quality: int = 60) -> Path:
        """
        Write [`side_by_side`] as an animated WebP, which browsers and README pages show.

        Args:
            path (`str` or `os.PathLike`): the file, `x.webp`.
            side (`int`, defaults to `192`): pixels of a picture's shorter side, at least.
            every (`int`, defaults to `3`): of so many frames, one is written; the speed stays.
            quality (`int`, defaults to `60`): from 0 to 100.
        """
        check_int("every", every, 1)
        frames = [self.picture(frame, side) for frame in range(0, sum(self.chunk_frames), every)]
        return save_animation(path, frames, self.fps / every, quality)

    def filmstrip(self, columns: int = 10, side: int = 96) -> np.ndarray:
        """
        The middle frames of evenly spaced chunks, a labeled row for each rollout; trimmed chunks have a red border,
        quarantined ones a purple border.

        Returns:
            `np.ndarray`: uint8 (H, W, 3).
        """
        check_int("columns", columns, 1)
        starts = np.cumsum(self.chunk_frames) - self.chunk_frames
        chosen = sorted(set(np.linspace(0, len(starts) - 1, columns).round().astype(int).tolist()))
        height, width = enlarged(next(iter(self.videos.values()))[0], side).shape[:2]
        digits = 0 if sum(self.chunk_frames) > 10 * self.fps else 1
        times = [f"{starts[chunk] / self.fps:.{digits}f} s" for chunk in chosen]
        rows = [np.concatenate([text_picture(text, 22, width) for text in ["", *times]], axis=1)]
        for name, video in self.videos.items():
            row = [text_picture(name, height, width)]
            for chunk in chosen:
                frame = enlarged(video[starts[chunk] + self.chunk_frames[chunk] // 2], side)
                row.append(bordered(frame, decision_event(self.decisions[name][chunk])))
            rows.append(np.concatenate(row, axis=1))
        return np.concatenate(rows)

    def plot_drift(self) -> Any:
        """
        How far the colors of each chunk are from the start, a line for each rollout over pictures of it; below, the
        severity that the gate saw.

        Returns:
            `matplotlib.figure.Figure`
        """
        num = len(self.videos)
        figure = optional("matplotlib.figure", "matplotlib").Figure(
            figsize=(9, 3.6 + 0.5 * num + 1.5 * num), layout="constrained"
        )
        heights = [*[0.5] * num, 3, *[1.3] * num]
        axes = list(figure.subplots(len(heights), 1, height_ratios=heights))
        colors = dict(zip(self.videos, [*LINES, *(f"C{number}" for number in range(num))]))
        for name, axis in zip(self.videos, axes):
            self._draw_strip(axis, name, colors[name])
        axis = axes[num]
        for name, drift in self.drifts.items():
            axis.plot(drift, color=colors[name], linewidth=2, label=name)
        axis.set(title=f"{self.part}: distance from the start (100: black became white)", xlim=(0, len(drift) - 1))
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, loc="upper left")
        for name, axis in zip(self.videos, axes[num + 1 :]):
            plot_severity(axis, self.decisions[name])
            axis.set(title=f"{name}: severity of each chunk", xlim=(0, len(drift) - 1))
            if axis is not axes[num + 1]:
                axis.get_legend().remove()  # the first has it
        for axis in axes[num:]:
            axis.spines[["top", "right"]].set_visible(False)
            axis.title.set_size(10)
        axes[-1].set_xlabel("chunk")
        return figure

    def _draw_strip(self, axis: Any, name: str, color: str) -> None:
        starts = np.cumsum(self.chunk_frames) - self.chunk_frames
        chosen = np.linspace(0, len(starts) - 1, 16).round().astype(int)
        axis.imshow(np.concatenate([self.videos[name][starts[chunk]] for chunk in chosen], axis=1), aspect="auto")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", color=color)


# Pictures


def save_animation(path: str | os.PathLike, frames: list[np.ndarray], fps: float, quality: int = 60) -> Path:
    """Write uint8 frames (H, W, 3) as an animated WebP that plays in a loop; the file appears when it is complete."""
    path = Path(path)
    check(path.suffix.lower() == ".webp", "path", str(path), "a file that ends with .webp")
    first, *rest = map(Image.fromarray, frames)
    unfinished = path.with_name(f".{path.name}.unfinished")
    options = {"duration": round(1000 / fps), "loop": 0, "quality": quality, "method": 4}
    try:
        first.save(unfinished, "webp", save_all=True, append_images=rest, **options)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def enlarged(frame: np.ndarray, side: int) -> np.ndarray:
    """A whole number of times as large, smoothly, so that the shorter side has `side` pixels or more."""
    height, width = frame.shape[:2]
    factor = max(1, -(-side // min(height, width)))
    picture = Image.fromarray(frame).resize((factor * width, factor * height), Image.Resampling.BICUBIC)
    return frame if factor == 1 else np.asarray(picture)


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def labeled(picture: np.ndarray, text: str) -> np.ndarray:
    """A picture under its name."""
    size = max(picture.shape[1] // 16, 12)
    header = Image.new("RGB", (picture.shape[1], 2 * size), PAPER)
    ImageDraw.Draw(header).text((size // 3, size), text, INK, font(size), "lm")
    return np.concatenate([np.asarray(header), picture])


def text_picture(text: str, height: int, width: int) -> np.ndarray:
    """Text in the middle of an empty picture, as large as fits."""
    size = 14
    while size > 7 and font(size).getlength(text) > width - 6:
        size -= 1
    picture = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(picture).text((width // 2, height // 2), text, INK, font(size), "mm")
    return np.asarray(picture)


def bordered(picture: np.ndarray, event: str | None) -> np.ndarray:
    """With a white line around it; a colored one where something happened."""
    color = {"trimmed": (214, 39, 40), "quarantined": (123, 50, 148)}.get(event, PAPER)
    line = 2 if event is None else 3
    picture = picture.copy()
    for border in (picture[:line], picture[-line:], picture[:, :line], picture[:, -line:]):
        border[...] = color
    return picture


def beside(pictures: list[np.ndarray], gap: int = 8) -> np.ndarray:
    """Pictures of one height, in a row."""
    space = np.full((pictures[0].shape[0], gap, 3), PAPER, np.uint8)
    parts = [part for picture in pictures for part in (picture, space)]
    return np.concatenate(parts[:-1], axis=1)
