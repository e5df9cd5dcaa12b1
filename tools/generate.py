# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""One video or a thousand, on one device or many: what is missing is generated, what is there already is skipped.

Each video grows as `x.growing.mp4`, which plays up to its last chunk, with its decisions in `x.growing.jsonl`. When it
is complete and verified, both lose the `.growing`, and `x.json` says what was asked for.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from imageio_ffmpeg import get_ffmpeg_exe
from tqdm import tqdm

from ..tokentrim_state import has_state, remove_states
from ..tokentrim_video import numbered


PIPELINE = Path(__file__).parent.parent / "pipeline_tokentrim.py"
NUM_FRAMES = 81  # of a call that says nothing


class Job(NamedTuple):
    prompt: str
    seed: int
    path: Path
    settings: dict  # arguments of the call
    state_dir: Path | None = None  # where the run is saved


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


def read_schedule(path: Path) -> dict[int, str]:
    """
    Prompts by chunk, from a JSON file.

    Raises:
        `ValueError`: it does not hold one JSON object whose keys are chunks.
    """
    try:
        return {int(chunk): prompt for chunk, prompt in json.loads(path.read_text()).items()}
    except (AttributeError, ValueError) as error:
        valid = 'one JSON object of chunks and prompts, {"20": "a green circle"}'
        raise ValueError(f"{path} has to hold {valid}: {error}") from error


def read_jobs(prompts: Path, out: Path, seed: int, settings: dict, state_dir: Path | None = None) -> list[Job]:
    """A job for each line of a file that has words: line n, from 0, makes out/n-its-words.mp4 with seed `seed` + n, and
    saves to state_dir/n-its-words."""
    jobs = []
    for number, line in enumerate(prompts.read_text().splitlines()):
        words = re.sub(r"\W+", "-", line.lower()).strip("-")[:60]
        if words:
            name = f"{number:05}-{words}"
            folder = None if state_dir is None else state_dir / name
            jobs.append(Job(line.strip(), seed + number, out / f"{name}.mp4", settings, folder))
    return jobs


def generate_video(
    pipe: DiffusionPipeline,
    job: Job,
    fps: float = 16,
    save_every: int = 10,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """
    Write one video, a .jsonl of its decisions, one chunk on a line, and a .json of what was asked for.

    Args:
        pipe ([`TokenTrimPipeline`]): the pipeline.
        job ([`Job`]): with `num_frames=None` in its settings it goes on until Ctrl-C; it is complete then, unless it has a
            `state_dir` and may go on.
        fps (`float`, defaults to `16`): frames per second.
        save_every (`int`, defaults to `10`): chunks between two states.
        resume (`bool`, defaults to `False`): whether to go on with the state in `job.state_dir`, if there is one.
        progress (`bool`, defaults to `True`): whether to show the stream's bar.
    """
    growing = growing_path(job.path)
    pairs = [(growing_of, path) for growing_of, path in zip(videos_of(job, growing), videos_of(job, job.path))]
    job.path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"num_frames": NUM_FRAMES, **job.settings}
    if resume and job.state_dir is not None and has_state(job.state_dir):
        for unfinished, path in pairs:  # where it was stopped between the renames
            log, growing_log = path.with_suffix(".jsonl"), unfinished.with_suffix(".jsonl")
            if log.exists() and not growing_log.exists():
                os.replace(log, growing_log)
        stream = pipe.resume(job.state_dir)
    else:
        generator = torch.Generator().manual_seed(job.seed)
        saving = {"state_dir": job.state_dir, "save_every": save_every}
        stream = pipe.stream(job.prompt, generator=generator, **saving, **settings)
    plan = stream.run.plan
    try:
        with stream:
            stream.save_video(growing, fps, progress)
    except KeyboardInterrupt:
        begun = [unfinished for unfinished, _ in pairs if unfinished.stat().st_size]
        if not plan.is_endless or job.state_dir is not None or len(begun) < len(pairs):
            raise
        for unfinished in begun:
            play(unfinished)
    else:
        for unfinished, _ in pairs:
            verify(unfinished, [plan.chunk_frames(index) for index in range(len(plan.chunk_partition))])
    record = {"prompt": job.prompt, "seed": job.seed, "fps": fps, "arguments": job.settings}
    for unfinished, path in pairs:
        os.replace(unfinished.with_suffix(".jsonl"), path.with_suffix(".jsonl"))
        path.with_suffix(".json").write_text(json.dumps(record))
        os.replace(unfinished, path)  # last: a video that is there is complete
    if job.state_dir is not None:
        remove_states(job.state_dir)


def growing_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.growing{path.suffix}")


def videos_of(job: Job, path: Path) -> list[Path]:
    """The files of a job's videos: one, but for `num_videos_per_prompt`."""
    num_videos = job.settings.get("num_videos_per_prompt", 1)
    return [numbered(path, video, num_videos) for video in range(num_videos)]


def verify(path: Path, chunk_frames: Sequence[int]) -> None:
    """
    A growing video plays to its last frame, and no decision is missing.

    Raises:
        `OSError`: a frame or a decision is missing, or cannot be read.
    """
    num_lines = path.with_suffix(".jsonl").read_text().count("\n")
    for found, expected, what in (
        (play(path), sum(chunk_frames), "frames"),
        (num_lines, len(chunk_frames), "decisions"),
    ):
        if found != expected:
            raise OSError(f"{path} has {found} {what} instead of {expected}.")


def play(path: Path) -> int:
    """
    The frames of a video, all decoded.

    Raises:
        `OSError`: one cannot be decoded.
    """
    command = [get_ffmpeg_exe(), "-nostdin", "-v", "error", "-xerror", "-err_detect", "explode", "-i", str(path)]
    command += ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-progress", "pipe:1", "-"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", start_new_session=True)
    if done.returncode or done.stderr:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise OSError(f"{path} does not play to its end (exit status {done.returncode}): {reason[0]}")
    return int(re.findall(r"^frame=\s*(\d+)", done.stdout, flags=re.M)[-1])


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


def generate_missing(
    jobs: Sequence[Job],
    checkpoint: str,
    dtype: str = "float32",
    fps: float = 16,
    save_every: int = 10,
    resume: bool = False,
) -> int:
    """
    Generate the videos that are missing, split over the processes of accelerate or torchrun.

    Args:
        jobs (`Sequence[Job]`): one for each video.
        checkpoint (`str`): folder or Hub id.
        dtype (`str`, defaults to `"float32"`): of the weights.
        fps (`float`, defaults to `16`), save_every (`int`, defaults to `10`), resume (`bool`, defaults to `False`):
            see [`generate_video`].

    Returns:
        `int`: how many failed, in all processes. A video that fails is reported, and the others go on.
    """
    # The first process to finish waits for the last one.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    todo = [job for job in jobs if not all(path.is_file() for path in videos_of(job, job.path))]
    state.print(f"{len(todo)} to generate, {len(jobs) - len(todo)} there already", file=sys.stderr)
    if not todo:
        return 0
    state.wait_for_everyone()  # all have looked before one writes, so that all split the same list
    pipe = load_pipeline(checkpoint, dtype, state)
    pipe.set_progress_bar_config(disable=len(todo) > 1)

    failed = []
    with state.split_between_processes(todo) as mine:
        several = {"desc": f"process {state.process_index}", "position": state.process_index}
        for job in tqdm(mine, **several, disable=len(todo) == 1):
            try:
                generate_video(pipe, job, fps, save_every, resume, progress=len(todo) == 1)
            except Exception as error:  # whatever it is, the other prompts are worth their videos
                failed.append(f"{job.path}: {type(error).__name__}: {error}")
    failed = gather_object(failed)
    if failed:
        state.print(*failed, sep="\n", file=sys.stderr)
    state.print(f"{len(todo) - len(failed)} done, {len(failed)} failed")
    state.destroy_process_group()
    return len(failed)
