# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a call returns, and ways to look at it: severities over time, evicted tokens, a film strip, an mp4."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from ..tokentrim_checks import check, check_int
from ..tokentrim_writing import check_target, numbered
from .mp4 import FPS, VIDEO_ENDINGS, optional, save_video
from .summary import as_page, count_events, figure_as_html, tell_run, videos_as_html


TRIM, QUARANTINE = "#d62728", "#7b3294"
RED, PURPLE = (tuple(int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)) for color in (TRIM, QUARANTINE))


@dataclass
class TokenTrimPipelineOutput(BaseOutput):
    r"""
    Output of [`TokenTrimPipeline`].

    Args:
        frames (`torch.Tensor`, `np.ndarray`, or `list[list[PIL.Image.Image]]`):
            The videos, as `output_type` asks; latents are (B, C, T, H, W).
        decisions (`list[list[dict]]`):
            `decisions[video][chunk]`, plain JSON types: `chunk`, `severity` (`None` for the first), `threshold`
            (`None` while the gate is closed), `trim`, `tokens` (evicted grid indices), `regenerated_severity` (`None`
            where nothing was regenerated), `quarantined`, `reanchored` (`"held"`, `"watched"` or `None`), and facts of
            custom policies. The first chunk of a new prompt or a cut has `prompt_changed` (`True`).
            `method=["token_drift", ...]` adds `drift`, one number for each token of the grid.
        grid (`tuple[int, int]`): tokens of a latent frame, (height, width).
        chunk_frames (`list[int]`, *optional*): frames of each chunk, `None` where the videos are latents.
        fps (`float`, *optional*): frames per second that the model makes.
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]
    decisions: list[list[dict]]
    grid: tuple[int, int]
    chunk_frames: list[int] | None = None
    fps: float | None = None

    def __str__(self) -> str:
        """`40 chunks (10.0 s): 38 held, 0 trimmed, 0 quarantined`; a line for each video."""
        seconds = None if self.chunk_frames is None else sum(self.chunk_frames) / (self.fps or FPS)
        lines = [tell_run(len(decisions), seconds, count_events(decisions)) for decisions in self.decisions]
        return lines[0] if len(lines) == 1 else "\n".join(f"video {n}: {line}" for n, line in enumerate(lines))

    def __repr__(self) -> str:
        shape = tuple(self.frames.shape) if hasattr(self.frames, "shape") else f"{len(self.frames)} lists of images"
        return f"<{type(self).__name__}: frames {shape}; {'; '.join(str(self).splitlines())}>"

    def _repr_html_(self) -> str:
        """The first videos, what was done, and severities over time, for notebooks."""
        parts = []
        if self.chunk_frames:
            parts.append(videos_as_html(as_uint8(self.as_array()), self.fps or FPS, self.chunk_frames))
        with suppress(ImportError):  # without matplotlib
            parts.append(figure_as_html(self.plot_drift()))
        return as_page(str(self).splitlines(), *parts)

    def plot_drift(self) -> Any:
        """
        Severity, threshold and triggers over the chunks.

        Returns:
            `matplotlib.figure.Figure`: a row for each video.

        Raises:
            `ImportError`: matplotlib is not installed.
        """
        size = (9, 2.4 * len(self.decisions))
        figure = optional("matplotlib.figure", "matplotlib").Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(self.decisions), 1, sharex=True, squeeze=False)[:, 0]
        for video, (axis, video_decisions) in enumerate(zip(axes, self.decisions)):
            plot_severity(axis, video_decisions)
            axis.set_title(f"video {video}")
        axis.set_xlabel("chunk")
        return figure

    def overlay_evictions(self) -> np.ndarray:
        """
        The videos with the tokens that each chunk evicted outlined, red around white, on all frames of that chunk.

        Returns:
            `np.ndarray`: (B, frames, H, W, 3) in [0, 1].

        Raises:
            `ValueError`: the videos are latents.
        """
        videos = self.as_array().copy()
        rows, columns = self.grid
        height, width = videos.shape[2] // rows, videos.shape[3] // columns  # of a token
        line = max(min(height, width) // 12, 1)
        for video, video_decisions in zip(videos, self.decisions):
            for decision, frames in zip(video_decisions, np.split(video, np.cumsum(self.chunk_frames))):
                for token in decision["tokens"]:
                    top, left = token // columns * height, token % columns * width
                    patch = frames[:, top : top + height, left : left + width]
                    outline(patch, 1, 2 * line)
                    outline(patch, RED, line)
        return videos

    def filmstrip(self, columns: int = 14) -> np.ndarray:
        """
        The middle frame of some chunks, triggered ones first: trimmed ones in a red frame with evicted tokens outlined,
        quarantined ones in a purple frame.

        Args:
            columns (`int`, defaults to `14`): about how many chunks; the first and the last are always there.

        Returns:
            `np.ndarray`: one picture with a row for each video, (height, width, 3) in [0, 1].

        Raises:
            `ValueError`: the videos are latents, or a run was interrupted in its first chunk.
        """
        check_int("columns", columns, 1)
        if not self.decisions[0]:
            raise ValueError("There is no chunk to show: the run was interrupted in its first one.")
        videos = self.overlay_evictions()
        middles = np.cumsum(self.chunk_frames) - self.chunk_frames + np.array(self.chunk_frames) // 2
        edge = max(videos.shape[3] // 32, 2)
        rows = []
        for video, video_decisions in zip(videos, self.decisions):
            row = []
            for chunk in choose_chunks(self.decisions, columns):
                frame = video[[middles[chunk]]]
                frame = np.pad(frame, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=1)
                if event := decision_event(video_decisions[chunk]):
                    outline(frame, RED if event == "trimmed" else PURPLE, edge)
                row.append(frame[0])
            rows.append(np.concatenate(row, axis=1))
        return np.concatenate(rows)

    def save_video(
        self, path: str | os.PathLike, fps: float | None = None, video: int | None = None
    ) -> Path | list[Path]:
        """
        Write the videos as mp4, byte for byte as a stream's `save_video` does. A file appears when it is complete.

        Args:
            path (`str` or `os.PathLike`): the file, `x.mp4`; several videos are numbered, `x-0.mp4`, `x-1.mp4`.
            fps (`float`, *optional*): frames per second; by default the model's.
            video (`int`, *optional*): only this video of the batch, as `path` itself.

        Returns:
            `Path` or `list[Path]`: the file, or the file of each video where there are several.

        Raises:
            `ImportError`: imageio-ffmpeg is not installed.
            `OSError`: ffmpeg fails, the disk is full, or the folder does not exist; an existing file stays as it was.
            `ValueError`: the videos are latents, or an argument is invalid.
        """
        videos, fps = self.as_array(), self.fps or FPS if fps is None else fps
        valid = f"an int from 0 to {len(videos) - 1}"
        check(video is None or video in range(len(videos)), "video", video, valid)
        chosen = list(range(len(videos))) if video is None else [video]
        paths = [numbered(path, each, len(chosen)) for each in chosen]
        for each in (path, *paths):
            check_target("path", each, VIDEO_ENDINGS)
        for each, video in zip(paths, chosen):
            save_video(each, as_uint8(videos[video]), fps, self.chunk_frames)
        return paths if len(paths) > 1 else paths[0]

    def as_array(self) -> np.ndarray:
        """The videos, whatever their `output_type`: (B, frames, H, W, 3) in [0, 1]."""
        if self.chunk_frames is None:
            raise ValueError("`output_type` must be 'np', 'pt' or 'pil' to look at the frames, but was 'latent'.")
        return as_array(self.frames)


def as_array(frames: torch.Tensor | np.ndarray | list) -> np.ndarray:
    """Videos, whatever their `output_type`: (B, frames, H, W, 3) in [0, 1]."""
    if isinstance(frames, np.ndarray):
        return frames
    if isinstance(frames, torch.Tensor):  # (B, frames, 3, H, W)
        return frames.permute(0, 1, 3, 4, 2).float().cpu().numpy()
    return np.stack([np.stack(list(map(np.asarray, video))) for video in frames]).astype(np.float32) / 255


def concatenated(parts: list) -> torch.Tensor | np.ndarray | list:
    """Parts of videos, of one `output_type`, one after the other."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=1)
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim=1)
    return [sum(videos, []) for videos in zip(*parts)]


def as_uint8(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def decision_event(decision: dict) -> str | None:
    """What happened to a chunk, if anything did."""
    return "quarantined" if decision["quarantined"] else "trimmed" if decision["trim"] else None


def choose_chunks(decisions: list[list[dict]], columns: int) -> list[int]:
    """Up to `columns` chunks worth showing: the first triggered ones, and others evenly spaced."""
    num_chunks = len(decisions[0])
    triggered = sorted(
        {each["chunk"] for video_decisions in decisions for each in video_decisions if decision_event(each)}
    )
    shown = set(triggered[: columns // 2])
    for chunk in np.linspace(0, num_chunks - 1, columns).round().astype(int):
        if len(shown) < columns:
            shown.add(int(chunk))
    return sorted(shown | {0, num_chunks - 1})


def plot_severity(axis: Any, decisions: list[dict]) -> None:
    """Severity, threshold and triggers of each chunk of one video, on matplotlib axes."""
    chunks = [each["chunk"] for each in decisions]
    severity = [np.nan if each["severity"] is None else each["severity"] for each in decisions]
    threshold = [np.nan if each["threshold"] is None else each["threshold"] for each in decisions]
    axis.plot(chunks, severity, ".-", color="0.3", label="severity")
    axis.plot(chunks, threshold, "--", color="tab:blue", label="threshold")
    trims = [each for each in decisions if each["trim"]]
    axis.plot([e["chunk"] for e in trims], [e["severity"] for e in trims], "o", color=TRIM, label="trimmed")
    axis.plot(
        [e["chunk"] for e in trims],
        [e["regenerated_severity"] for e in trims],
        "o",
        markerfacecolor="none",
        color=TRIM,
        label="regenerated",
    )
    for number, chunk in enumerate(each["chunk"] for each in decisions if each["quarantined"]):
        axis.axvline(chunk, color=QUARANTINE, linestyle=":", label=None if number else "quarantined")
    axis.set(ylabel="severity")
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # room for the legend
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper right", ncols=5, frameon=False)


def outline(patch: np.ndarray, color: Any, line: int) -> None:
    """Draw a line inside the border of (frames, h, w, 3), in place."""
    for border in (patch[:, :line], patch[:, -line:], patch[:, :, :line], patch[:, :, -line:]):
        border[...] = color
