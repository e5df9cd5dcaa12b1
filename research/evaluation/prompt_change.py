# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Does a new prompt show? Measured on the frames of the tiny world, for each transition.

python -m research.evaluation.prompt_change --seeds 4

Half of the prompts ask for another background, half for another color of the object. With guidance, `negative_prompt` is
the old prompt. For each way to change the prompt, it prints: the CIEDE2000 distance of the changing part to the requested
color (before the change, one and three chunks into it, and at the end), how many videos end nearest to that color of the
world's eight, after how many chunks, how far the other part has moved at the end, and how far the new color moved in the
last `--hold` chunks.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.color import rgb2lab

from research.training.world import COLORS, parse
from tokentrim.tokentrim_frames.output import as_uint8

from .experiment import sample_prompts
from .measures import difference, track_colors
from .rollouts import load_pipeline


TRANSITIONS = ("keep", "recache", "flush", "cut")
METHODS = ("plain", "tokentrim_plus")
LABS = {name: rgb2lab(np.array(color)[None, None])[0, 0] for name, color in COLORS.items()}


def other_prompt(prompt: str, seed: int) -> tuple[str, str, str]:
    """A prompt that changes one part, the name of that part, and its requested color."""
    scene = parse(prompt)
    free = [name for name in COLORS if name not in (scene.color, scene.background)]
    color = free[seed * 5 % len(free)]
    part = ("background", "object")[seed % 2]
    changed = replace(scene, background=color) if part == "background" else replace(scene, color=color)
    return changed.prompt, part, color


def nearest(lab: np.ndarray) -> str | None:
    """The nearest color of the world."""
    return None if np.isnan(lab).any() else min(LABS, key=lambda name: difference(lab, LABS[name]))


def measure(
    frames: np.ndarray, prompt: str, changed: str, part: str, color: str, at: int, size: int, hold: int
) -> dict:
    """Measure one video, (frames, H, W, 3), with chunks of `size` frames; chunk `at` is the first under the new prompt."""
    before, after = track_colors(frames[: at * size], prompt, size), track_colors(frames[at * size :], changed, size)
    other = "object" if part == "background" else "background"
    distances = difference(getattr(after, part), LABS[color])
    names = [nearest(lab) for lab in getattr(after, part)]
    stays = [all(name == color for name in names[chunk:]) for chunk in range(len(names))]
    return {
        "before": float(difference(getattr(before, part)[-1], LABS[color])),
        "distances": [float(distance) for distance in distances],
        "reached": names[-1] == color,
        "after": stays.index(True) + 1 if any(stays) else None,
        "other": float(difference(getattr(after, other)[-1], getattr(before, other)[-1])),
        "held": float(difference(getattr(after, part)[-1], getattr(after, part)[-1 - hold])),
    }


def row(results: Sequence[dict]) -> list[str]:
    def mean(values):
        present = [value for value in values if value is not None and not np.isnan(value)]
        return f"{np.mean(present):.1f}" if present else "-"

    reached = [each for each in results if each["reached"]]
    return [
        mean([each["before"] for each in results]),
        *(mean([each["distances"][chunk] for each in results]) for chunk in (0, 2, -1)),
        f"{len(reached)}/{len(results)}",
        f"{np.median([each['after'] for each in reached]):.0f}" if reached else "-",
        mean([each["other"] for each in results]),
        mean([each["held"] for each in reached]),
    ]


def strip(videos: dict[str, np.ndarray], at: int, size: int) -> Image.Image:
    """A row for each video, (frames, H, W, 3): the middle frame of every chunk, and a line at the change."""
    rows = []
    for name, frames in videos.items():
        middles = as_uint8(frames[size // 2 :: size])
        middles = [np.pad(each, ((1, 1), (1, 1), (0, 0)), constant_values=255) for each in middles]
        line = np.zeros((middles[0].shape[0], 4, 3), dtype=np.uint8)
        picture = np.concatenate([*middles[:at], line, *middles[at:]], axis=1)
        label = Image.new("RGB", (150, picture.shape[0]), "white")
        ImageDraw.Draw(label).text((4, picture.shape[0] // 2 - 6), name, fill="black")
        rows.append(np.concatenate([np.asarray(label), picture], axis=1))
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="videos of each way")
    parser.add_argument("--first-seed", type=int, default=5000)
    parser.add_argument("--chunks", type=int, default=14)
    parser.add_argument("--at", type=int, default=4, help="first chunk under the new prompt")
    parser.add_argument("--hold", type=int, default=3, help="last chunks over which a new color must stay")
    parser.add_argument("--blend-chunks", type=int, default=0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 6.0])
    parser.add_argument("--transitions", nargs="+", default=TRANSITIONS, choices=TRANSITIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/prompt_change"))
    args = parser.parse_args()
    if args.chunks < args.at + args.hold + 1:
        parser.error(f"--chunks must be at least {args.at + args.hold + 1}: the change, and {args.hold} to hold it")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    size = pipe.config.num_frames_per_chunk * pipe.vae_scale_factor_temporal
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    prompts = sample_prompts(seeds)
    changes = [other_prompt(prompt, seed) for prompt, seed in zip(prompts, seeds)]
    for seed, prompt, (changed, *_) in zip(seeds, prompts, changes):
        print(f"{seed}: {prompt!r} -> {changed!r}")

    titles = ("method", "guidance", "transition", "before", "+1", "+3", "end", "reached", "after", "other", "held")
    print("\n| " + " | ".join(titles) + " |\n|" + " --- |" * len(titles), flush=True)
    record = []
    for method in METHODS:
        for guidance in args.guidance:
            videos = {}
            for transition in args.transitions:
                output = pipe(
                    prompts,
                    negative_prompt=prompts if guidance > 1 else None,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    num_frames=args.chunks * size - (pipe.vae_scale_factor_temporal - 1),
                    method=method,
                    prompt_schedule={args.at: [changed for changed, *_ in changes]},
                    prompt_transition=transition,
                    blend_chunks=args.blend_chunks,
                )
                results = [
                    measure(frames, prompt, *change, args.at, size, args.hold)
                    for frames, prompt, change in zip(output.frames, prompts, changes)
                ]
                way = {"method": method, "guidance": guidance, "transition": transition}
                print("| " + " | ".join([method, f"{guidance:g}", transition, *row(results)]) + " |", flush=True)
                record += [{**way, "seed": seed, **result} for seed, result in zip(seeds, results)]
                for video, frames in enumerate(output.frames[:2]):
                    videos[f"{transition}, {seeds[video]}"] = frames
            strip(videos, args.at, size).save(args.out / f"{method}-{guidance:g}.png")
            (args.out / "results.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
