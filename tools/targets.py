# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Files that `tokentrim drift` writes, refused before anything is measured where they may not be; without PyTorch."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..tokentrim_writing import check_target


PLOT_MARK = "tokentrim drift"  # in the metadata of our own figures, which are no frames
LARGEST = 2**28  # bytes of a file that is looked into


class Target(NamedTuple):
    endings: tuple[str, ...]
    is_ours: Callable[[Path], bool]
    ours: str


def is_report(path: Path) -> bool:
    """Whether a file is the JSON of an earlier report."""
    if path.stat().st_size > LARGEST:
        return False
    try:
        report = json.loads(path.read_text())
    except ValueError:
        return False
    videos = report.get("videos") if isinstance(report, dict) else None
    return isinstance(videos, list) and all(isinstance(each, dict) and "measures" in each for each in videos)


def is_table(path: Path) -> bool:
    """Whether a file is the CSV of an earlier report."""
    with path.open("rb") as file:
        return file.readline(2**16).startswith(b"video,num_frames,")


def is_plot(path: Path) -> bool:
    """Whether a file is an earlier figure."""
    return path.stat().st_size <= LARGEST and PLOT_MARK.encode() in path.read_bytes()


TARGETS = {
    "json": Target((".json",), is_report, "numbers that `tokentrim drift --json` wrote"),
    "csv": Target((".csv",), is_table, "a table that `tokentrim drift --csv` wrote"),
    "plot": Target((".png", ".pdf", ".svg"), is_plot, "a figure that `tokentrim drift --plot` drew"),
}


def check_targets(paths: dict[str, Path | None], given: Sequence[Path]) -> None:
    """
    Refuse what cannot be written or may not be replaced.

    Args:
        paths (`dict[str, Path | None]`): by the name of `TARGETS`.
        given (`Sequence[Path]`): what is measured.

    Raises:
        `OSError`, `ValueError`: the option and its value are in the message.
    """
    for name, path in paths.items():
        if path is not None:
            check_target(f"--{name}", path, *TARGETS[name], given=given)
