# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One video or a thousand, on one device or many.

    python examples/generate.py "a red circle moving right over a blue background" --out circle.mp4
    accelerate launch examples/generate.py --prompts prompts.txt --out videos
    torchrun --nproc-per-node 2 examples/generate.py --prompts prompts.txt --out videos    # on CPUs

Line n of the prompts, from 0, makes videos/n-its-words.mp4 with the seed `--seed` + n, on whatever process, and beside
it a .json of the decisions. What is there already is skipped: start again after an interruption.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from tqdm import tqdm


ROOT = Path(__file__).resolve().parent.parent


class Job(NamedTuple):
    prompt: str
    seed: int
    path: Path
    settings: dict  # arguments of the call


def list_jobs(options: argparse.Namespace) -> list[Job]:
    settings = {name: value for file in options.config for name, value in json.loads(file.read_text()).items()}
    if options.num_frames is not None:
        settings["num_frames"] = options.num_frames
    if options.prompts is None:
        return [Job(options.prompt, options.seed, options.out, settings)]
    jobs = []
    for number, line in enumerate(options.prompts.read_text().splitlines()):
        words = re.sub(r"\W+", "-", line.lower()).strip("-")[:60]
        if words:
            path = options.out / f"{number:05}-{words}.mp4"
            jobs.append(Job(line.strip(), options.seed + number, path, settings))
    return jobs


def generate(pipe: DiffusionPipeline, job: Job, fps: float) -> None:
    """The video appears when it is complete."""
    output = pipe(job.prompt, generator=torch.Generator().manual_seed(job.seed), **job.settings)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=job.path.parent) as partial:
        video = output.save_video(Path(partial) / job.path.name, fps)
        record = {"prompt": job.prompt, "seed": job.seed, "decisions": output.decisions[0]}
        job.path.with_suffix(".json").write_text(json.dumps(record))
        os.replace(video, job.path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("prompt", nargs="?", help="one prompt")
    given.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line")
    parser.add_argument("--out", type=Path, required=True, help="an .mp4 file, or a folder with --prompts")
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "tiny-world"), help="folder or Hub id")
    parser.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE", help="JSON of arguments; may be repeated"
    )
    parser.add_argument("--num-frames", type=int, help="frames of each video (default: the config's, or 81)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights"
    )
    options = parser.parse_args(arguments)
    if options.prompt is not None and options.out.suffix != ".mp4":
        parser.error(f"--out has to end with .mp4 for one prompt, but is {str(options.out)!r}")
    return options


def generate_missing(jobs: list[Job], checkpoint: str, dtype: str, fps: float) -> int:
    """Split what is not there over the processes of accelerate; returns how many failed, in all of them."""
    # The first process to finish waits for the last one.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    todo = [job for job in jobs if not job.path.is_file()]
    state.print(f"{len(todo)} to generate, {len(jobs) - len(todo)} there already")
    if not todo:
        return 0
    state.wait_for_everyone()  # all have looked before one writes, so that all split the same list
    with state.main_process_first():  # Diffusers copies the code to a folder that all processes share
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint,
            custom_pipeline=str(ROOT / "pipeline_tokentrim.py"),
            trust_remote_code=True,
            dtype=getattr(torch, dtype),
        ).to(state.device)
    # The last bits of a matrix product on CPUs depend on where in memory its weights begin: alike in every process.
    for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
        for weight in model.parameters():
            weight.data = weight.data.clone()
    pipe.set_progress_bar_config(disable=len(todo) > 1)

    failed = []
    with state.split_between_processes(todo) as mine:
        for job in tqdm(mine, desc=f"process {state.process_index}", position=state.process_index):
            try:
                generate(pipe, job, fps)
            except Exception as error:  # whatever it is, the other prompts are worth their videos
                failed.append(f"{job.path}: {type(error).__name__}: {error}")
    failed = gather_object(failed)
    state.print("\n".join([f"{len(todo) - len(failed)} done, {len(failed)} failed", *failed]))
    state.destroy_process_group()
    return len(failed)


def main() -> None:
    options = parse()
    sys.exit(generate_missing(list_jobs(options), options.checkpoint, options.dtype, options.fps) > 0)


if __name__ == "__main__":
    main()
