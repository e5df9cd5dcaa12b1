# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A leaderboard of methods, from the lines that `tokentrim compare` writes on any machine.

python -m research.evaluation.leaderboard runs/*/methods.jsonl

Methods are ranked within one checkpoint and length, by the mean drift of their videos; differences are paired.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


FORMAT = 1
NEEDED = {
    "format",
    "method",
    "checkpoint",
    "weights",
    "chunks",
    "drift",
    "difference",
    "low",
    "high",
    "pairs",
    "videos",
}
# What must be equal for drifts to be ranked together.
GROUP = ("weights", "chunks", "num_frames", "size", "settings", "top", "prompts")
HEADER = ("method", "drift", "against the reference [95%]", "motion", "cuts", "calls", "frames/s", "videos", "machine")


def read_lines(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """
    The lines of all files; of a method that one machine measured twice, the one with more videos.

    Raises:
        `ValueError`: a line is not of `tokentrim compare`; the message names the file and the line.
    """
    lines = {}
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict) or not NEEDED <= set(line) or line["format"] != FORMAT:
                raise ValueError(f"{path} must hold lines of `tokentrim compare`, but line {number} is {text!r:.60}.")
            key = json.dumps([*(line[name] for name in GROUP), line["arguments"], line["machine"], line["first_seed"]])
            if key not in lines or lines[key]["videos"] < line["videos"]:
                lines[key] = line
    return list(lines.values())


def group_lines(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Lines whose drifts compare, under a title, the least drift first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line[name] for name in GROUP]), []).append(line)
    titled = {}
    for group in groups.values():
        first = group[0]
        height, width = first["size"]
        title = (
            f"{first['checkpoint']} ({first['weights']}): {first['chunks']} chunks, {first['num_frames']} frames of"
            f" {width} x {height}, {len(first['prompts'])} prompts"
        )
        while title in titled:  # other prompts or arguments of the same number
            title += "'"
        titled[title] = sorted(group, key=lambda line: line["drift"])
    return titled


def format_row(line: dict[str, Any]) -> str:
    """One method as a row in Markdown."""
    against = line["reference"]
    if line["difference"] is not None:
        against += f" {line['difference']:+.1f} [{line['low']:+.1f}, {line['high']:+.1f}]"
    motion, calls = line["means"]["motion_late_to_early"], line["calls"]
    cells = (
        line["method"],
        f"{line['drift']:.1f}",
        against,
        "-" if motion is None else f"{motion:.2f}",
        f"{line['means']['cuts']:.1f}",
        "-" if calls is None else f"{calls:.2f}x",
        f"{line['speed']:.2f}",
        str(line["videos"]),
        line["machine"],
    )
    return f"| {' | '.join(cells)} |"


def format_board(lines: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown for each checkpoint and length."""
    parts = []
    for title, group in group_lines(lines).items():
        parts += [f"**{title}**", "", f"| {' | '.join(HEADER)} |", "| --- " * len(HEADER) + "|"]
        parts += [*map(format_row, group), ""]
    return "\n".join(parts).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="methods.jsonl of comparisons")
    options = parser.parse_args()
    for path in options.files:
        if not path.is_file():
            parser.error(f"{path} does not exist")
    try:
        print(format_board(read_lines(options.files)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
