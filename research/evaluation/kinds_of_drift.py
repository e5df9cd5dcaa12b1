# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How plain rollouts drift: how fast, in which direction, whether they stop, and whether videos drift alike.

python -m research.evaluation.kinds_of_drift research/runs/plus research/runs/travelling_200

Reads the folders of `research.evaluation.run`. Color is the mean CIELAB of a chunk; distances are CIE76, medians over
videos.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from .report import MEAN_COLOR


CHUNKS = (5, 20, 50, 100)


def load_colors(out: Path, method: str) -> np.ndarray:
    """Mean colors, (videos, chunks, 3)."""
    table = pd.read_csv(out / "table.csv.gz")
    rows = table[table["method"] == method].sort_values(["seed", "chunk"])
    return rows[MEAN_COLOR].to_numpy().reshape(rows["seed"].nunique(), -1, 3)


def describe(colors: np.ndarray) -> dict[str, float | str]:
    """A row of the table, from the colors of videos, (videos, chunks, 3)."""
    middle = colors.shape[1] // 2
    moved = np.linalg.norm(colors - colors[:, :1], axis=-1)
    first, second = colors[:, middle] - colors[:, 0], colors[:, -1] - colors[:, middle]
    change = colors[:, -1] - colors[:, 0]
    cosines = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    pairs = np.array(list(itertools.combinations(range(len(colors)), 2)))
    apart = np.linalg.norm(colors[pairs[:, 0]] - colors[pairs[:, 1]], axis=-1).mean(axis=0)
    return {
        **{f"after {chunk}": np.median(moved[:, chunk]) for chunk in CHUNKS if chunk < colors.shape[1] - 1},
        "at the end": np.median(moved[:, -1]),
        "second half over first": np.median(np.linalg.norm(second, axis=1) / np.linalg.norm(first, axis=1)),
        "cosine of the halves": np.median(cosines),
        "common share": np.linalg.norm(change.mean(axis=0)) / np.linalg.norm(change, axis=1).mean(),
        "if at random": len(colors) ** -0.5,
        "mean change L*, a*, b*": " ".join(f"{value:+.1f}" for value in change.mean(axis=0)),
        "distance between videos, end over start": apart[-1] / apart[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders written by research.evaluation.run")
    parser.add_argument("--method", default="plain")
    args = parser.parse_args()
    rows = {out.name: describe(load_colors(out, args.method)) for out in args.runs}
    names = max(rows.values(), key=len)
    print(f"| {args.method} | " + " | ".join(rows) + " |\n" + "| --- " * (1 + len(rows)) + "|")
    for name in names:
        cells = [row.get(name, "") for row in rows.values()]
        print(f"| {name} | " + " | ".join(cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
