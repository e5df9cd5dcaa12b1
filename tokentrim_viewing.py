# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Looking at a run: severities over time, evicted tokens on the frames, a film strip, an mp4."""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import torch


TRIM = "#d62728"
RED = tuple(int(TRIM[place : place + 2], 16) / 255 for place in (1, 3, 5))


def optional(module: str, packages: str) -> ModuleType:
    """Import a module of a package that only looking at a run needs, by its name alone: whatever an import statement
    of these files names, Diffusers' loader imports and misses at every load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: `pip install {packages}`.") from error


def as_array(frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]) -> np.ndarray:
    """Videos of any `output_type` but `"latent"` -> (B, frames, H, W, 3) in [0, 1]."""
    if isinstance(frames, torch.Tensor):  # (B, frames, 3, H, W)
        return frames.permute(0, 1, 3, 4, 2).float().cpu().numpy()
    if isinstance(frames, np.ndarray):
        return frames
    return np.stack([np.stack([np.asarray(frame) for frame in video]) for video in frames]).astype(np.float32) / 255


def as_uint8(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def choose_chunks(decisions: list[list[dict]], columns: int) -> list[int]:
    """Up to `columns` chunks worth showing: the first triggered ones, and others evenly spaced."""
    num_chunks = len(decisions[0])
    triggered = sorted({each["chunk"] for of_video in decisions for each in of_video if each["trim"]})
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
    axis.set(ylabel="severity")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper right", ncols=4, frameon=False)


def plot_drift(decisions: list[list[dict]]) -> Any:
    """A matplotlib figure with a row for each video."""
    figure = optional("matplotlib.figure", "matplotlib").Figure(
        figsize=(9, 2.4 * len(decisions)), layout="constrained"
    )
    axes = figure.subplots(len(decisions), 1, sharex=True, squeeze=False)[:, 0]
    for video, (axis, of_video) in enumerate(zip(axes, decisions)):
        plot_severity(axis, of_video)
        axis.set_title(f"video {video}")
    axis.set_xlabel("chunk")
    return figure


def outline(patch: np.ndarray, color: Any, line: int) -> None:
    """Draw a line inside the border of (frames, h, w, 3), in place."""
    for border in (patch[:, :line], patch[:, -line:], patch[:, :, :line], patch[:, :, -line:]):
        border[...] = color


def overlay_evictions(
    videos: np.ndarray, decisions: list[list[dict]], grid: tuple[int, int], chunk_frames: list[int]
) -> np.ndarray:
    """(B, frames, H, W, 3) with the tokens that each chunk evicted outlined, red around white, on all its frames."""
    videos = videos.copy()
    height, width = videos.shape[2] // grid[0], videos.shape[3] // grid[1]  # of a token
    line = max(min(height, width) // 12, 1)
    for video, of_video in zip(videos, decisions):
        for decision, frames in zip(of_video, np.split(video, np.cumsum(chunk_frames))):
            for token in decision["tokens"]:
                top, left = token // grid[1] * height, token % grid[1] * width
                token_frames = frames[:, top : top + height, left : left + width]
                outline(token_frames, 1, 2 * line)
                outline(token_frames, RED, line)
    return videos


def filmstrip(
    videos: np.ndarray, decisions: list[list[dict]], grid: tuple[int, int], chunk_frames: list[int], columns: int
) -> np.ndarray:
    """(rows, width, 3): a row for each video, the middle frame of each of some chunks, trimmed ones in a red frame."""
    videos = overlay_evictions(videos, decisions, grid, chunk_frames)
    chunks = choose_chunks(decisions, columns)
    middles = np.cumsum(chunk_frames) - chunk_frames + np.array(chunk_frames) // 2
    edge = max(videos.shape[3] // 32, 2)
    rows = []
    for video, of_video in zip(videos, decisions):
        row = []
        for chunk in chunks:
            frame = np.pad(video[[middles[chunk]]], ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=1)
            if of_video[chunk]["trim"]:
                outline(frame, RED, edge)
            row.append(frame[0])
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def save_video(path: str | os.PathLike, frames: np.ndarray, fps: float) -> Path:
    """Write uint8 (frames, H, W, 3) as mp4."""
    optional("imageio_ffmpeg", "imageio imageio-ffmpeg")
    writer = optional("imageio.v3", "imageio imageio-ffmpeg")
    writer.imwrite(path, frames, plugin="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=2)
    return Path(path)
