# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a method did, counted and told in a sentence; and pictures and videos as HTML, for notebooks."""

import base64
import html
import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .mp4 import save_video


SHOWN_VIDEOS = 4  # of a batch, in a notebook
SHOWN_SIDE = 256  # pixels: smaller frames are shown larger


def list_events(decision: dict) -> list[str]:
    """What was done about a chunk of one video, by its decision."""
    outcome = {"held": "held", "watched": "released"}.get(decision.get("reanchored"))
    done = [("trimmed", decision.get("trim")), ("quarantined", decision.get("quarantined"))]
    return [*([outcome] if outcome else []), *(event for event, happened in done if happened)]


def count_events(decisions: Iterable[dict]) -> Counter:
    """How many chunks were held, released, trimmed and quarantined."""
    return Counter(event for decision in decisions for event in list_events(decision))


def tell_events(counts: Counter) -> str:
    """`38 held, 0 trimmed, 0 quarantined`; released chunks are told where there are any."""
    events = ["held", *(["released"] if counts["released"] else []), "trimmed", "quarantined"]
    return ", ".join(f"{counts[event]} {event}" for event in events)


def tell_run(num_chunks: int, seconds: float | None, counts: Counter) -> str:
    """`40 chunks (10.0 s): 38 held, 0 trimmed, 0 quarantined`; without seconds where they are unknown."""
    length = "" if seconds is None else f" ({seconds:.1f} s)"
    return f"{num_chunks} chunk{'' if num_chunks == 1 else 's'}{length}: {tell_events(counts)}"


def tell_chunk(decision: dict) -> str:
    """`trimmed 156 tokens, held`, or `accepted`."""
    events = [
        f"trimmed {len(decision['tokens'])} tokens" if event == "trimmed" else event for event in list_events(decision)
    ]
    return ", ".join(events) or "accepted"


# For notebooks


def as_page(sentences: Iterable[str], *parts: str) -> str:
    """HTML of some lines of text, and of parts that are HTML already."""
    lines = "".join(f"<p style='margin:4px 0'>{html.escape(sentence)}</p>" for sentence in sentences)
    return f"<div>{lines}{''.join(parts)}</div>"


def videos_as_html(videos: np.ndarray, fps: float, chunk_frames: Sequence[int] | None = None) -> str:
    """The first few of some videos, uint8 (B, frames, H, W, 3), that play in a loop; nothing where they cannot be
    encoded."""
    height, width = videos.shape[2:4]
    scale = max(1, -(-SHOWN_SIDE // min(height, width)))
    style = f"width:{scale * width}px;max-width:100%;margin:2px;image-rendering:{'pixelated' if scale > 1 else 'auto'}"
    shown = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for video in videos[:SHOWN_VIDEOS]:
                path = save_video(Path(folder) / "video.mp4", video, fps, chunk_frames)
                data = base64.b64encode(path.read_bytes()).decode()
                source = f"data:video/mp4;base64,{data}"
                shown.append(
                    f"<video controls autoplay loop muted playsinline style='{style}' src='{source}'></video>"
                )
    except (ImportError, OSError) as error:
        return as_page([f"(no video: {error})"])
    return "".join(shown)


def figure_as_html(figure: Any) -> str:
    """A figure of matplotlib as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<div><img style='max-width:100%' src='data:image/png;base64,{data}'></div>"
