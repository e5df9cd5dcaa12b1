# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One video or a thousand, on one device or many: what is missing is generated, what is there already is skipped."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from tqdm import tqdm


PIPELINE = Path(__file__).parent.parent / "pipeline_tokentrim.py"


class Job(NamedTuple):
    prompt: str
    seed: int
    path: Path
    settings: dict  # arguments of the call


def read_settings(paths: Sequence[Path]) -> dict:
    """
    Arguments of the call from JSON files; where two name the same, the later one counts.

    Raises:
        `ValueError`: a file does not hold one JSON object.
    """
    settings = {}
    for path in paths:
        try:
            settings |= json.loads(path.read_text())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has to hold one JSON object of arguments of the call: {error}") from error
    return settings


def read_jobs(prompts: Path, out: Path, seed: int, settings: dict) -> list[Job]:
    """A job for each line of a file that has words: line n, from 0, makes out/n-its-words.mp4 with seed `seed` + n."""
    jobs = []
    for number, line in enumerate(prompts.read_text().splitlines()):
        words = re.sub(r"\W+", "-", line.lower()).strip("-")[:60]
        if words:
            jobs.append(Job(line.strip(), seed + number, out / f"{number:05}-{words}.mp4", settings))
    return jobs


def generate_video(pipe: DiffusionPipeline, job: Job, fps: float) -> None:
    """Write one video and, beside it, a .json of its decisions. The video appears when it is complete."""
    output = pipe(job.prompt, generator=torch.Generator().manual_seed(job.seed), **job.settings)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=job.path.parent) as partial:
        video = output.save_video(Path(partial) / job.path.name, fps)
        record = {"prompt": job.prompt, "seed": job.seed, "decisions": output.decisions[0]}
        job.path.with_suffix(".json").write_text(json.dumps(record))
        os.replace(video, job.path)


def load_pipeline(checkpoint: str, dtype: str, state: PartialState) -> DiffusionPipeline:
    """The pipeline on this process's device."""
    with state.main_process_first():  # Diffusers copies the code to a folder that all processes share
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint, custom_pipeline=str(PIPELINE), trust_remote_code=True, dtype=getattr(torch, dtype)
        ).to(state.device)
    # The last bits of a matrix product on CPUs depend on where in memory its weights begin: alike in every process.
    for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
        for weight in model.parameters():
            weight.data = weight.data.clone()
    return pipe


def generate_missing(jobs: Sequence[Job], checkpoint: str, dtype: str = "float32", fps: float = 16) -> int:
    """
    Generate the videos that are missing, split over the processes of accelerate or torchrun.

    Args:
        jobs (`Sequence[Job]`): one for each video.
        checkpoint (`str`): folder or Hub id.
        dtype (`str`, defaults to `"float32"`): of the weights.
        fps (`float`, defaults to `16`): frames per second of the videos.

    Returns:
        `int`: how many failed, in all processes. A video that fails is reported, and the others go on.
    """
    # The first process to finish waits for the last one.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    todo = [job for job in jobs if not job.path.is_file()]
    state.print(f"{len(todo)} to generate, {len(jobs) - len(todo)} there already", file=sys.stderr)
    if not todo:
        return 0
    state.wait_for_everyone()  # all have looked before one writes, so that all split the same list
    pipe = load_pipeline(checkpoint, dtype, state)
    pipe.set_progress_bar_config(disable=len(todo) > 1)

    failed = []
    with state.split_between_processes(todo) as mine:
        for job in tqdm(mine, desc=f"process {state.process_index}", position=state.process_index):
            try:
                generate_video(pipe, job, fps)
            except Exception as error:  # whatever it is, the other prompts are worth their videos
                failed.append(f"{job.path}: {type(error).__name__}: {error}")
    failed = gather_object(failed)
    if failed:
        state.print(*failed, sep="\n", file=sys.stderr)
    state.print(f"{len(todo) - len(failed)} done, {len(failed)} failed")
    state.destroy_process_group()
    return len(failed)
