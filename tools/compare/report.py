# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The files that a comparison is read from: report.html, tables, and a line for each method. No PyTorch here."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...tokentrim_writing import write_whole
from .paired import DRIFT, FEWEST, Standing, judge_methods, tell_verdict
from .plan import REFERENCE
from .results import Results


HERE = Path(__file__).resolve().parent
FORMAT = 1  # of a method's line
PAGE, METHODS, VIDEOS, BOARD = "report.html", "methods.csv", "videos.csv", "methods.jsonl"
SHOWN = ("motion_late_to_early", "cuts", "contrast_slope", "worst_similarity")  # measures of the page's table
ABOUT_VIDEO = ("method", "prompt_number", "prompt", "seed", "file", "num_frames", "calls", "seconds", "memory")


def write_report(results: Results, about: Mapping[str, Any]) -> str:
    """
    Write the report of what is finished so far.

    Args:
        results ([`Results`]): the folder.
        about (`Mapping`): what it compares.

    Returns:
        `str`: the verdict.
    """
    lines, methods = results.read(), list(about["methods"])
    reference = REFERENCE if REFERENCE in methods else methods[0]
    lines.sort(key=lambda line: (methods.index(line["method"]), line["prompt_number"], line["seed"]))
    standings = judge_methods(lines, methods, reference)
    verdict = tell_verdict(standings, reference)
    planned = len(methods) * len(about["prompts"]) * about["seeds"]
    board = [describe_method(each, about, lines, reference) for each in standings]
    tables = {METHODS: as_csv(map(flat_standing, standings)), VIDEOS: as_csv(map(flat_video, lines))}
    page = {
        "verdict": verdict,
        "reference": reference,
        "fewest": FEWEST,
        "planned": planned,
        "about": about,
        "methods": board,
        "videos": lines,
        "tables": tables,
    }
    for name, text in tables.items():
        write_whole(results.out / name, text)
    write_whole(results.out / BOARD, "".join(json.dumps(line, allow_nan=False) + "\n" for line in board))
    write_whole(results.out / PAGE, make_page(page))
    return verdict


def describe_method(standing: Standing, about: Mapping, lines: Sequence[Mapping], reference: str) -> dict[str, Any]:
    """All that is needed to compare a method across machines: `research.evaluation.leaderboard` reads such lines."""
    mine = [line for line in lines if line["method"] == standing.name]
    given = ("checkpoint", "weights", "dtype", "chunks", "settings", "top", "prompts", "first_seed", "seeds", "batch")
    return {
        "format": FORMAT,
        "method": standing.name,
        "arguments": about["methods"][standing.name],
        "reference": reference,
        **{name: about[name] for name in given},
        **{name: mine[0][name] for name in ("num_frames", "fps", "size", "machine", "versions")},
        **{name: value for name, value in asdict(standing).items() if name not in ("name", "reference")},
        "drift": standing.means[DRIFT],
        "reference_drift": standing.reference,
    }


def flat_standing(standing: Standing) -> dict[str, Any]:
    row = asdict(standing)
    means = row.pop("means")
    return {"method": row.pop("name"), **row, **means}


def flat_video(line: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: line[name] for name in ABOUT_VIDEO}, **line["measures"]}


def as_csv(rows: Any) -> str:
    """A table with a column for each key; what is not defined is empty."""
    rows, table = list(rows), io.StringIO()
    if rows:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table.getvalue()


def make_page(page: Mapping[str, Any]) -> str:
    """One HTML file with its style, its script and all numbers; videos and film strips lie beside it."""
    content = json.dumps(page, allow_nan=False).replace("<", "\\u003c")  # no text ends the script
    html = (HERE / "report.html").read_text()
    for mark, text in (
        ("/* style */", (HERE / "report.css").read_text()),
        ("/* script */", (HERE / "report.js").read_text()),
        ("/* data */", content),  # last: nothing is looked for in what users typed
    ):
        before, _, after = html.partition(mark)
        html = before + text + after
    return html


def format_table(standings: Sequence[Mapping[str, Any]]) -> str:
    """The methods as lines of text, the least drift first."""
    rows = [["", "drift", "difference", "95% interval", "motion", "cuts", "calls", "frames/s", "videos"]]
    for line in sorted(standings, key=lambda line: line["drift"]):
        interval = "" if line["low"] is None else f"{line['low']:+.1f} to {line['high']:+.1f}"
        motion = line["means"]["motion_late_to_early"]
        rows.append(
            [
                line["method"],
                f"{line['drift']:.1f}",
                "" if line["difference"] is None else f"{line['difference']:+.1f}",
                interval,
                "-" if motion is None else f"{motion:.2f}",
                f"{line['means']['cuts']:.1f}",
                "-" if line["calls"] is None else f"{line['calls']:.2f}x",
                f"{line['speed']:.2f}",
                str(line["videos"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )
