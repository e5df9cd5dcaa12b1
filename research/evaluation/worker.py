# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One process of an experiment, started by `research.evaluation.run` through `accelerate launch`."""

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from research.training import photographs, world
from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_policies.registry import DEFAULT_METHOD
from tokentrim.tokentrim_policies.trim import SeverityMonitor

from .controls import LATENT_CORRECTIONS, OTHER_POLICIES, PIXEL_CORRECTIONS
from .defects import Painted, paint_chunk
from .experiment import Experiment, part
from .measures import frame_look, measure_chunks
from .places import measure_places
from .rollouts import ROOT, counted_calls, counted_keys, draw_noise
from .signals import SIGNALS


def run_job(pipe: TokenTrimPipeline, experiment: Experiment, method: str, seeds: list[int]) -> tuple:
    """A row for each video and chunk, and the middle frame of each chunk, uint8 (videos, chunks, H, W, 3)."""
    prompts, control = experiment.prompts(seeds), experiment.control(method)
    per_chunk = pipe.config.num_frames_per_chunk
    kinds = [experiment.defects[seed % len(experiment.defects)] if experiment.defects else None for seed in seeds]
    painted = Painted(kinds, seeds, experiment.defect_chunk)
    arguments = {"method": DEFAULT_METHOD, **experiment.arguments(method)}
    if control in OTHER_POLICIES:
        arguments = OTHER_POLICIES[control](arguments)
    if experiment.defects:
        arguments["method"] = [painted, SeverityMonitor(), arguments["method"]]  # severities come from painted chunks

    start = time.perf_counter()
    with counted_calls(pipe) as calls, counted_keys() as keys:
        output = pipe(
            prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            latents=draw_noise(pipe, seeds, experiment.num_chunks * per_chunk),
            output_type="latent",
            **arguments,
        )
        latents = paint_chunk(output.frames, painted, per_chunk) if experiment.defects else output.frames
        shown = LATENT_CORRECTIONS[control](latents, per_chunk) if control in LATENT_CORRECTIONS else latents
        frames = pipe.decode_latents(shown, "np")
        frames = PIXEL_CORRECTIONS[control](frames, per_chunk) if control in PIXEL_CORRECTIONS else frames
    seconds = time.perf_counter() - start
    patch_size = pipe.transformer.config.patch_size
    tokens = latents[0, 0, 0].numel() / math.prod(patch_size[1:])  # of a latent frame
    chunks = latents.split(per_chunk, dim=2)
    signals = {name: signal(chunks, patch_size) for name, signal in SIGNALS.items()}  # each (B, chunks)
    rows = []
    for video, (seed, prompt, kind) in enumerate(zip(seeds, prompts, kinds)):
        measured = measure(experiment, frames[video], prompt, per_chunk)
        for chunk, (measures, decision) in enumerate(zip(measured, output.decisions[video], strict=True)):
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "prompt": prompt,
                    "defect": kind,
                    "chunk": chunk,
                    **measures,
                    "severity": decision["severity"],
                    "threshold": decision["threshold"],
                    "trim": decision["trim"],
                    "evicted": len(decision["tokens"]),
                    "regenerated_severity": decision["regenerated_severity"],
                    "quarantined": decision["quarantined"],
                    **{name: values[video, chunk].item() for name, values in signals.items()},
                    "calls": len(calls) / experiment.num_chunks,  # of the batch
                    "keys": np.mean(keys) / tokens,
                    "seconds": seconds / experiment.num_chunks / len(seeds),
                }
            )
    return pd.DataFrame(rows), (frames[:, per_chunk // 2 :: per_chunk] * 255).round().astype(np.uint8)


def measure(experiment: Experiment, frames: np.ndarray, prompt: str, per_chunk: int) -> list[dict[str, float]]:
    """Measure each chunk of a video, (frames, H, W, 3), with the measures of its world and with those for any video."""
    if experiment.world is world:
        return measure_chunks(frames, prompt, per_chunk)
    looks = [frame_look(chunk) for chunk in np.split(frames, len(frames) // per_chunk)]
    if experiment.world is photographs:
        places = measure_places(frames[per_chunk // 2 :: per_chunk], prompt)
        return [{**look, **place} for look, place in zip(looks, places, strict=True)]
    return looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    experiment, state = Experiment.load(args.config), PartialState(cpu=not torch.cuda.is_available())
    jobs = [job for job in experiment.jobs() if not part(args.out, *job).exists()]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // state.num_processes))
    pipe = TokenTrimPipeline.from_pretrained(str(ROOT / experiment.checkpoint), dtype=getattr(torch, experiment.dtype))
    pipe.to(state.device)
    pipe.vae.enable_slicing()  # video by video: faster on CPUs, and less memory
    pipe.set_progress_bar_config(disable=True)
    for method, seeds in jobs[state.process_index :: state.num_processes]:
        rows, frames = run_job(pipe, experiment, method, seeds)
        path = part(args.out, method, seeds)
        np.savez_compressed(path.with_suffix(".npz"), frames=frames)
        rows.to_csv(path.with_suffix(".partial"), index=False)
        path.with_suffix(".partial").rename(path)


if __name__ == "__main__":
    main()
