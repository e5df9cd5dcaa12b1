# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim drift`."""

import argparse
import sys
from pathlib import Path

from ..numbers import DISTANCE, TOP
from ..targets import TARGETS, check_targets
from . import add_command, usage


TOO_FAR = 3  # exit code


def add_parser(commands) -> None:
    details = """\
A verdict in a sentence, and numbers. Two videos are shown side by side; of more, tables have color similarity of end and
start, slopes of brightness, contrast, saturation and sharpness, start-end contrast, VDE, late / early motion, the worst
twentieth, and whether the videos of a folder grow alike. All is measured from the frames alone, without a model.
docs/drift.md says what each number means and what it cannot tell.

Exit code: 0, or 1 if a video cannot be measured, or 3 if one ends farther away than --max-distance.

examples:
  tokentrim drift fox.mp4
  tokentrim drift plain.mp4 tokentrim_plus.mp4
  tokentrim drift fox.mp4 --max-distance 5
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
    parser.add_argument(
        "--max-distance",
        type=DISTANCE.parse,
        metavar="D",
        help="exit with 3 if the colors of a video end farther than this from its start, in %% of black to white",
    )
    parser.add_argument(
        "--top",
        type=TOP.parse,
        default=1.0,
        metavar="SHARE",
        help="measure only this share of the picture, from the top, where the rest is meant to change (default: 1)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="figure to write: .png, .pdf or .svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all measures, and their values over time")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="all measures, a row for each video")


def run(options: argparse.Namespace) -> int:
    with usage(options):
        check_targets({name: getattr(options, name) for name in TARGETS}, options.videos)
    try:
        from tqdm import tqdm

        from ..decoding import read_rate
        from ..drift import format_report, measure_video, write_csv, write_json
        from ..drift_plot import write_plot
        from ..frames import crop_top, find_videos, read_frames
        from ..records import read_prompt
        from ..verdict import exceeding, format_side_by_side, format_verdicts
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed: `pip install opencv-python-headless matplotlib`."
        ) from error

    videos, drifts = find_videos(options.videos), []
    for path in videos:
        try:
            frames = tqdm(read_frames(path), desc=path.name, unit=" frames", leave=False, disable=None)
            frames = crop_top(frames, options.top)
            drifts.append(measure_video(str(path), frames, read_rate(path), read_prompt(path)))
        except ValueError as error:  # the other videos are worth their numbers
            print(f"tokentrim drift: error: {error}", file=sys.stderr)
    if drifts:
        print(
            format_verdicts(drifts), "", (format_side_by_side if len(drifts) == 2 else format_report)(drifts), sep="\n"
        )
        for path, write in ((options.json, write_json), (options.csv, write_csv), (options.plot, write_plot)):
            if path is not None:
                write(path, drifts)
    if len(drifts) < len(videos):
        return 1
    too_far = [] if options.max_distance is None else exceeding(drifts, options.max_distance)
    for sentence in too_far:
        print(f"tokentrim drift: {sentence}", file=sys.stderr)
    return TOO_FAR if too_far else 0
