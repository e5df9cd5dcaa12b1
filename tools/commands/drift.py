# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim drift`."""

import argparse
import sys
from pathlib import Path

from ..targets import TARGETS, check_targets
from . import add_command, usage


def add_parser(commands) -> None:
    details = """\
Everything is measured from the frames alone, without a model: colour similarity of end and start, slopes of brightness,
contrast, saturation and sharpness, start-end contrast, VDE, late / early motion, the worst twentieth, and whether the
videos of a folder grow alike. docs/drift.md says what each number means and what it cannot tell.

examples:
  tokentrim drift fox.mp4
  tokentrim drift videos/plain videos/tokentrim_plus --plot drift.png --csv drift.csv"""
    summary = "how much videos of any model drift, as tables and a figure"
    parser = add_command(commands, run, "drift", summary, details)
    parser.add_argument(
        "videos",
        type=Path,
        nargs="+",
        metavar="VIDEO",
        help="mp4, gif, webm, mov, mkv or avi; a folder of pictures, which is one video; or a folder of videos",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="figure to write: .png, .pdf or .svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all measures, and their values over time")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="all measures, a row for each video")


def run(options: argparse.Namespace) -> int:
    with usage(options):
        check_targets({name: getattr(options, name) for name in TARGETS}, options.videos)
    try:
        from tqdm import tqdm

        from ..drift import format_report, measure_video, write_csv, write_json
        from ..drift_plot import write_plot
        from ..frames import find_videos, read_frames
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed: `pip install opencv-python-headless matplotlib`."
        ) from error

    videos, drifts = find_videos(options.videos), []
    for path in videos:
        try:
            frames = tqdm(read_frames(path), desc=path.name, unit=" frames", leave=False, disable=None)
            drifts.append(measure_video(str(path), frames))
        except ValueError as error:  # the other videos are worth their numbers
            print(f"tokentrim drift: error: {error}", file=sys.stderr)
    if drifts:
        print(format_report(drifts))
        for path, write in ((options.json, write_json), (options.csv, write_csv), (options.plot, write_plot)):
            if path is not None:
                write(path, drifts)
    return int(len(drifts) < len(videos))
