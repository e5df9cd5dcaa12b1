# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`make demo`: one prompt and one noise, rolled out plain, with TokenTrim as in the paper, and with `tokentrim_plus`."""

import argparse
import json
import math
from pathlib import Path

from .measures import as_rgb, color_drift, summarize_drift, track_colors
from .pictures import drift_plot, enlarge, film_strip, save_video, side_by_side
from .rollouts import CHECKPOINT, METHODS, PROMPTS, load_pipeline, run_method


def _or_gone(drift: float) -> str:
    """Format a measure of the object; the object may be missing for the whole last half."""
    return f"{'gone':>11}" if math.isnan(drift) else f"{drift:11.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=PROMPTS, default=CHECKPOINT.name, help="a folder of checkpoints/")
    parser.add_argument("--prompt", help="the prompt; default: an example of the world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args()
    args.prompt = args.prompt or PROMPTS[args.world]
    args.out.mkdir(parents=True, exist_ok=True)

    pipe = load_pipeline(CHECKPOINT.parent / args.world)
    num_frames_per_chunk = pipe.config.num_frames_per_chunk
    has_object = args.world.startswith("tiny-world")  # one object on a background, whose colors can be measured
    pipe.set_progress_bar_config(desc="warming up")
    run_method(pipe, "plain", [args.prompt], [args.seed], num_chunks=2)
    runs = {}
    for method in METHODS:
        pipe.set_progress_bar_config(desc=method)
        runs[method] = run_method(pipe, method, [args.prompt], [args.seed], args.chunks)

    frames = {method: run.frames[0] for method, run in runs.items()}
    decisions = {method: run.decisions[0] for method, run in runs.items()}
    large = {method: enlarge(video) for method, video in frames.items()}
    for method, video in large.items():
        save_video(args.out / f"{method}.mp4", video)
    save_video(args.out / "side_by_side.mp4", side_by_side(large))
    (args.out / "decisions.json").write_text(json.dumps(decisions, indent=1))

    side = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]  # size of a token in pixels
    grid = (frames["plain"].shape[1] // side, frames["plain"].shape[2] // side)
    film_strip(frames, decisions, grid).savefig(args.out / "filmstrip.png", dpi=110)
    if has_object:
        colors = {m: track_colors(video, args.prompt, num_frames_per_chunk) for m, video in frames.items()}
        parts = ("background", "object")
        drift_plot(
            decisions,
            {method: {part: as_rgb(getattr(each, part)) for part in parts} for method, each in colors.items()},
            {method: {part: color_drift(getattr(each, part)) for part in parts} for method, each in colors.items()},
        ).savefig(args.out / "drift.png", dpi=110)

    plain = runs["plain"]
    header = (
        "",
        "chunks",
        "triggers",
        "evicted",
        "quarantined",
        "seconds",
        "overhead",
        "calls",
    )
    measures = ("dE background", "dE object", "motion") if has_object else ()
    print(
        f"\n{args.prompt!r}, seed {args.seed}",
        "{:18}{:>8}{:>10}{:>9}{:>13}{:>9}{:>10}{:>8}".format(*header)
        + "".join(f"{name:>{width}}" for name, width in zip(measures, (15, 11, 8))),
        sep="\n",
    )
    for method, run in runs.items():
        measured = ""
        if has_object:
            drift = summarize_drift(run.frames[0], args.prompt, num_frames_per_chunk)
            measured = f"{drift['background_drift']:15.2f}{_or_gone(drift['object_drift'])}{drift['motion']:8.2f}"
        print(
            f"{method:18}{args.chunks:8}{sum(each['trim'] for each in run.decisions[0]):10}"
            f"{sum(len(each['tokens']) for each in run.decisions[0]):9}"
            f"{sum(each['quarantined'] for each in run.decisions[0]):13}{run.seconds:9.1f}"
            f"{run.seconds / plain.seconds:9.2f}x{run.denoiser_calls / plain.denoiser_calls:7.2f}x{measured}"
        )
    print(
        "triggers, quarantined: chunks; evicted: grid positions; overhead, calls: seconds and transformer calls relative to plain"
    )
    if has_object:
        print(
            "dE: CIEDE2000 distance of the color to the first chunk, mean over the last half; motion: pixels per frame"
        )
    print(f"written to {args.out}/: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    main()
