# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Generate one video or many, on one device or several. Finished videos are skipped.

Each video grows as `x.growing.mp4`, which plays up to its last chunk, with its decisions in `x.growing.jsonl`. When it
is complete and verified, both lose the `.growing`, and `x.json` records its inputs.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import Timeout
from imageio_ffmpeg import get_ffmpeg_exe
from tqdm import tqdm

from ..pipeline_tokentrim import TokenTrimPipeline
from ..tokentrim_files.run_state import has_state, load_state, remove_states
from ..tokentrim_frames.mp4 import check_beginning
from ..tokentrim_writing import lock_of, locked
from .checkpoints import download, find_checkpoint, read_fps
from .given import read_given
from .interrupts import finish_first
from .jobs import NUM_FRAMES, Job, check_jobs
from .loading import find_device, free_memory, load_checkpoint, load_without_weights, place
from .memory import describe_shortage, estimate_memory
from .records import check_records, fingerprint_folder, make_record, write_record


def generate_video(
    pipe: TokenTrimPipeline,
    job: Job,
    record: dict,
    save_every: int = 10,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """
    Write one video, a .jsonl of its decisions, one chunk per line, and a .json of its inputs.

    Args:
        pipe ([`TokenTrimPipeline`]): the pipeline.
        job ([`Job`]): with `num_frames=None` in its settings it continues until Ctrl-C. It is complete then, unless it has a
            `state_dir` and can resume.
        record (`dict`): of [`make_record`].
        save_every (`int`, defaults to `10`): chunks between two states.
        resume (`bool`, defaults to `False`): whether to resume from the state in `job.state_dir`, if there is one.
        progress (`bool`, defaults to `True`): whether to show the stream's bar.
    """
    pairs = list(zip(job.videos(job.growing), job.videos()))
    if resume and job.state_dir is not None and has_state(job.state_dir):
        undo_renames(job, pairs)
        objects = read_given(pipe, job)
        stream = pipe.resume(job.state_dir, **objects)
    else:
        generator = torch.Generator().manual_seed(job.seed)
        saving = {"state_dir": job.state_dir, "save_every": save_every}
        stream = pipe.stream(job.prompt, generator=generator, **saving, **call_arguments(pipe, job))
    sizes = stream.run.sizes
    try:
        with stream, finish_first(stream):
            stream.save_video(job.growing, record["fps"], progress)
            if stream.cut_short:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        begun = [growing for growing, _ in pairs if growing.stat().st_size]
        if not sizes.is_endless or job.state_dir is not None or len(begun) < len(pairs):
            raise
        for growing in begun:
            play(growing)
    else:
        for growing, _ in pairs:
            verify(growing, [sizes.chunk_frames(index) for index in range(len(sizes.chunk_partition))])
    for growing, path in pairs:
        os.replace(growing.with_suffix(".jsonl"), path.with_suffix(".jsonl"))
        write_record(path.with_suffix(".json"), record)
        os.replace(growing, path)  # last, because an existing video counts as complete
        print(path, flush=True)
    if job.state_dir is not None:
        remove_states(job.state_dir)


def verify(path: Path, chunk_frames: Sequence[int]) -> None:
    """
    Check that a growing video plays to its last frame and that no decision is missing.

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
    Decode all frames of a video; returns their number.

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


def prepare_pipeline(
    todo: Sequence[Job], folder: Path, dtype: str, device: torch.device, offload: str, trust_remote_code: bool
) -> TokenTrimPipeline:
    """The pipeline, and folders to write to, if it takes the arguments: weights are loaded after that, if they can."""
    if not trust_remote_code:  # code could make models of any class
        check_call(load_without_weights(folder), todo[0])
    pipe = load_pipeline(folder, dtype, device, offload, trust_remote_code)
    check_call(pipe, todo[0])
    pipe.set_progress_bar_config(disable=len(todo) > 1)
    for job in todo:
        for path in (job.path, job.state_dir or job.path):
            path.parent.mkdir(parents=True, exist_ok=True)
    return pipe


def undo_renames(job: Job, pairs: Sequence[tuple[Path, Path]]) -> None:
    """Where a process was stopped between the renames at its end. A file that the run did not write stays where it is."""
    known = None
    for growing, path in pairs:
        for suffix in (".mp4", ".jsonl"):
            before, after = growing.with_suffix(suffix), path.with_suffix(suffix)
            if not before.exists() and after.exists():
                known = dict(load_state(job.state_dir)["files"]) if known is None else known
                if str(before) in known:
                    check_beginning(after, known[str(before)])
                    os.replace(after, before)


def load_pipeline(
    checkpoint: Path, dtype: str, device: torch.device, offload: str = "none", trust_remote_code: bool = False
) -> TokenTrimPipeline:
    """The pipeline on this process's device."""
    return place(load_checkpoint(checkpoint, getattr(torch, dtype), trust_remote_code), device, offload)


def sweep(job: Job, resume: bool) -> None:
    """Remove the files of a process that was killed after its video was complete."""
    if lock_of(job.path).exists():
        with suppress(Timeout), locked(job.path, wait=False):
            pass
    if resume and job.state_dir is not None:
        remove_states(job.state_dir)


def call_arguments(pipe: TokenTrimPipeline, job: Job) -> dict[str, Any]:
    return {"num_frames": NUM_FRAMES, **job.settings, **read_given(pipe, job)}


def check_call(pipe: TokenTrimPipeline, job: Job) -> None:
    """Raise `ValueError` for arguments that the pipeline refuses; no model runs."""
    arguments = call_arguments(pipe, job)
    try:
        pipe.plan(job.prompt, **{**arguments, "num_frames": arguments["num_frames"] or NUM_FRAMES})
    except (TypeError, ValueError) as error:
        raise ValueError(str(error)) from error


def generate_missing(
    jobs: Sequence[Job],
    checkpoint: str,
    dtype: str | None = None,
    fps: float | None = None,
    save_every: int = 10,
    resume: bool = False,
    device: str | None = None,
    offload: str = "none",
    trust_remote_code: bool = False,
) -> int:
    """
    Generate the missing videos, split over the processes of accelerate or torchrun.

    Args:
        jobs (`Sequence[Job]`): one for each video.
        checkpoint (`str`): folder or Hub id.
        dtype (`str`, *optional*): of the weights; by default float32 on a CPU, else bfloat16.
        fps (`float`, *optional*): frames per second; by default the checkpoint's.
        save_every (`int`, defaults to `10`), resume (`bool`, defaults to `False`): see [`generate_video`].
        device (`str`, *optional*): by default this process's accelerator, or the CPU.
        offload (`str`, defaults to `"none"`): `"model"`, `"sequential"` or `"group"`: which parts wait in main memory.
        trust_remote_code (`bool`, defaults to `False`): whether code in the checkpoint may run.

    Returns:
        `int`: number of failures in all processes. A failure is reported, and the other videos continue.

    Raises:
        `OSError`: a file could not be written.
        `ValueError`: an existing video was made from other inputs, or an argument is invalid.
    """
    check_jobs(jobs)
    where = find_device(device)
    # The first process to finish waits for the last one.
    state = PartialState(cpu=where.type == "cpu", timeout=timedelta(days=30))
    where = where if device is not None else state.device
    with state.main_process_first():
        folder = find_checkpoint(checkpoint) or download(checkpoint, trust_remote_code)
    fps = read_fps(folder) if fps is None else fps
    dtype = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    weights = fingerprint_folder(folder)

    def record_of(job: Job) -> dict:
        return make_record(job, fps, dtype, checkpoint, weights)

    done, todo = [], []
    for job in jobs:
        (done if job.is_done() else todo).append(job)
    note = check_records(done, list(map(record_of, done)))
    told = f" ({note})" if note else ""
    state.print(f"{len(todo)} to generate, {len(done)} there already{told}", file=sys.stderr)
    for job in done:
        sweep(job, resume)
    if not todo:
        return 0
    state.wait_for_everyone()  # all have looked before one writes, so that all split the same list
    shortage = estimate_memory(folder, todo[0].settings, dtype, offload)
    if told := describe_shortage(*shortage, free_memory(where), str(where), offload, dtype):
        state.print(told, file=sys.stderr)
    pipe = prepare_pipeline(todo, folder, dtype, where, offload, trust_remote_code)

    failed, busy = [], []

    def attempt(job: Job, wait: bool) -> None:
        try:
            with locked(job.path, wait):
                if job.is_done():  # finished by another process meanwhile
                    check_records([job], [record_of(job)])
                else:
                    generate_video(pipe, job, record_of(job), save_every, resume, progress=len(todo) == 1)
        except Timeout:
            busy.append(job)
        except Exception as error:  # continue with the other prompts after any error
            failed.append(f"{job.path}: {type(error).__name__}: {error}")

    with state.split_between_processes(todo) as mine:
        several = {"desc": f"process {state.process_index}", "position": state.process_index}
        for job in tqdm(mine, **several, disable=len(todo) == 1):
            attempt(job, wait=False)
        for job in busy:
            print(f"{job.path}: waiting for the process that is making it", file=sys.stderr)
            attempt(job, wait=True)
    failed = gather_object(failed)
    if failed:
        state.print(*failed, sep="\n", file=sys.stderr)
    state.print(f"{len(todo) - len(failed)} done, {len(failed)} failed", file=sys.stderr)
    state.destroy_process_group()
    return len(failed)
