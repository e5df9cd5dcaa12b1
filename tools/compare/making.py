# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Make the videos of a comparison that are missing, batch by batch, and measure each one from its file."""

import io
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from PIL import Image

from ... import __version__
from ...pipeline_tokentrim import TokenTrimPipeline
from ...tokentrim_frames.summary import count_events
from ...tokentrim_writing import write_whole
from ..checkpoints import download, find_checkpoint
from ..drift import NUM_SEGMENTS, measure_video
from ..frames import crop_top, read_frames
from ..loading import find_device, free_memory, load_checkpoint, load_without_weights, place
from ..memory import estimate_memory
from ..records import fingerprint_folder
from .plan import Plan, Video
from .report import BOARD, format_table, write_report
from .results import GROWING, Results


LARGEST_BATCH = 8
SHARE = 0.6  # of the free memory, that a batch's caches may take; activations come on top
PROBED = 3  # chunks that are timed before a comparison begins
STRIP_FRAMES, STRIP_SIDE = 12, 96


class Maker:
    """
    Makes what a folder lacks.

    Args:
        plan ([`Plan`]): what is compared.
        results ([`Results`]): its folder, which the caller owns.
        dtype (`str`, *optional*), device (`str`, *optional*), offload (`str`), trust_remote_code (`bool`): as in
            [`generate_missing`].

    Raises:
        `ValueError`: the checkpoint cannot do what a method asks for, or the folder compares something else.
    """

    def __init__(
        self,
        plan: Plan,
        results: Results,
        dtype: str | None = None,
        device: str | None = None,
        offload: str = "none",
        trust_remote_code: bool = False,
    ):
        self.results, where = results, find_device(device)
        self.state = PartialState(cpu=where.type == "cpu")
        where = where if device is not None else self.state.device
        with self.state.main_process_first():
            folder = find_checkpoint(plan.checkpoint) or download(plan.checkpoint, trust_remote_code)
        dtype = dtype or ("float32" if where.type == "cpu" else "bfloat16")
        if not trust_remote_code:
            check_plan(load_without_weights(folder), plan)
        batch = plan.batch or fit_batch(folder, plan, dtype, where)
        made_with = {"weights": fingerprint_folder(folder), "dtype": dtype}
        if self.state.is_main_process:
            results.join(plan, made_with, batch)
        self.state.wait_for_everyone()
        self.plan = results.join(plan, made_with, batch)
        self.about = results.read_about()
        self.pipe = place(load_checkpoint(folder, getattr(torch, dtype), trust_remote_code), where, offload)
        self.pipe.set_progress_bar_config(disable=True)
        self.num_frames = check_plan(self.pipe, self.plan)
        self.growing = results.out / GROWING / str(self.state.process_index)
        self.machine = describe_machine(where)

    def missing(self) -> list[list[Video]]:
        """Batches of the videos that are not there."""
        done = self.results.done()
        batches = [
            [each for each in batch if (each.method, each.number, each.seed) not in done]
            for batch in self.plan.batches(self.plan.batch)
        ]
        return [batch for batch in batches if batch]

    def make(self, tell: Callable[[int, int], None]) -> None:
        """
        Make all that is missing; `tell(done, of)` is called after each batch. The report grows with it.

        Raises:
            `OSError`: the disk is full; finished videos are kept.
        """
        todo = self.missing()
        self.report()
        mine = todo[self.state.process_index :: self.state.num_processes]
        for number, batch in enumerate(mine, 1):
            self.make_batch(batch)
            self.report()
            tell(number, len(mine))
        shutil.rmtree(self.growing, ignore_errors=True)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            shutil.rmtree(self.growing.parent, ignore_errors=True)
            self.report()
        self.state.destroy_process_group()

    def report(self) -> None:
        if self.state.is_main_process:
            write_report(self.results, self.about)

    def make_batch(self, batch: list[Video]) -> None:
        """In halves where the memory of the device does not suffice."""
        try:
            lines = self.generate(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self.make_batch(half)
            return
        self.results.add(lines)

    def generate(self, batch: list[Video]) -> list[dict[str, Any]]:
        """Files and lines of some videos of one method."""
        shutil.rmtree(self.growing, ignore_errors=True)  # of a killed process
        self.growing.mkdir(parents=True)
        path, most = self.growing / "video.mp4", Memory(self.pipe.device)
        start = time.perf_counter()
        with counted_calls(self.pipe.transformer) as calls, self.start(batch, self.num_frames, most) as stream:
            paths = stream.save_video(path, progress=False)
        seconds = (time.perf_counter() - start) / len(batch)
        cost = {"seconds": seconds, "calls": len(calls), "memory": most.bytes, "batch": len(batch), **self.machine}
        return [
            self.finish(video, each, cost, most.decisions[number])
            for number, (video, each) in enumerate(zip(batch, paths))
        ]

    def start(self, batch: list[Video], num_frames: int, most: "Memory") -> Any:
        """The stream of a batch: the noise of a video depends on its seed alone."""
        return self.pipe.stream(
            [video.prompt for video in batch],
            num_frames=num_frames,
            generator=[torch.Generator().manual_seed(video.seed) for video in batch],
            on_chunk=most.look,
            **self.plan.arguments(batch[0].method),
        )

    def finish(self, video: Video, growing: Path, cost: dict, decisions: list[dict]) -> dict[str, Any]:
        """Measure a video from its file, put the file in its place, and say all about it in a line."""
        target, kept = self.results.out / f"{video.stem}.mp4", []
        wanted = set(np.linspace(0, self.num_frames - 1, STRIP_FRAMES).round().astype(int).tolist())
        frames = crop_top(keep_frames(read_frames(growing), wanted, kept), self.plan.top)
        drift = measure_video(str(growing), frames, self.pipe.fps, video.prompt)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target.with_suffix(".jpg"), film_strip(kept))
        os.replace(growing.with_suffix(".jsonl"), target.with_suffix(".jsonl"))
        os.replace(growing, target)
        return {
            "method": video.method,
            "prompt_number": video.number,
            "prompt": video.prompt,
            "seed": video.seed,
            "file": f"{video.stem}.mp4",
            "num_frames": drift.num_frames,
            "fps": self.pipe.fps,
            "size": list(kept[0].shape[:2]),
            "measures": drift.measures(),
            "ends": drift.ends.tolist(),
            "distances": drift.distances().round(3).tolist(),
            "events": dict(count_events(decisions)),
            **cost,
        }

    def probe(self, todo: list[list[Video]]) -> float:
        """About how many seconds some batches take, from the last of a few chunks of the first one."""
        seconds, most = 0.0, Memory(self.pipe.device)
        with self.start(todo[0], self.num_frames, most) as stream:
            for _ in range(min(PROBED, self.plan.chunks)):
                start = time.perf_counter()
                next(stream)
                seconds = time.perf_counter() - start
        return seconds * self.plan.chunks * len(todo) / self.state.num_processes

    def summary(self) -> str:
        """The verdict and the methods, the least drift first."""
        lines = [json.loads(line) for line in (self.results.out / BOARD).read_text().splitlines()]
        return f"{write_report(self.results, self.about)}\n\n{format_table(lines)}\n"


def check_plan(pipe: TokenTrimPipeline, plan: Plan) -> int:
    """
    Refuse what this checkpoint cannot do, before anything is rendered; no model runs.

    Returns:
        `int`: frames of the videos.
    """
    num_frames = 0
    for name in plan.methods:
        try:
            sizes = pipe.plan(plan.prompts[0], num_frames=None, **plan.arguments(name)).sizes
        except (TypeError, ValueError) as error:
            raise ValueError(f"This checkpoint cannot do {name}: {error}") from error
        latent_frames = sum(map(sizes.chunk_size, range(plan.chunks)))
        lengths = {num_frames, (latent_frames - 1) * sizes.temporal_factor + 1} - {0}
        if len(lengths) > 1:
            raise ValueError(f"`methods` must make videos of one length, but {name} makes {max(lengths)} frames.")
        num_frames = lengths.pop()
    if num_frames <= NUM_SEGMENTS:
        raise ValueError(f"--chunks must make more than {NUM_SEGMENTS} frames, but {plan.chunks} make {num_frames}.")
    return num_frames


def fit_batch(folder: Path, plan: Plan, dtype: str, device: torch.device) -> int:
    """Videos whose caches fit into the free memory beside the weights, by the method that needs most."""
    needs = [estimate_memory(folder, plan.arguments(name), dtype) for name in plan.methods]
    weights, cache = (max(each) for each in zip(*needs))
    room = SHARE * free_memory(device) - weights
    return int(min(max(room // cache, 1), LARGEST_BATCH, len(plan.prompts) * plan.seeds))


class Memory:
    """The most memory that a run takes, looked at after each chunk, and the decisions of its videos."""

    def __init__(self, device: torch.device):
        self.is_cuda, self.bytes, self.decisions = device.type == "cuda", 0, {}
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def look(self, _: int, latents: torch.Tensor, decisions: list[dict]) -> None:
        used = torch.cuda.max_memory_allocated() if self.is_cuda else psutil.Process().memory_info().rss
        self.bytes = max(self.bytes, used)
        for number, decision in enumerate(decisions):
            self.decisions.setdefault(number, []).append(decision)


@contextmanager
def counted_calls(transformer: torch.nn.Module) -> Iterator[list]:
    """A list that grows by one for each call of the transformer."""
    calls: list[None] = []
    hook = transformer.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def keep_frames(frames: Iterator[np.ndarray], wanted: set[int], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The same frames; those of some numbers are appended to `kept`."""
    for number, frame in enumerate(frames):
        if number in wanted:
            kept.append(frame)
        yield frame


def film_strip(frames: list[np.ndarray]) -> bytes:
    """A JPEG of frames, uint8 (H, W, 3), in a row."""
    height, width = frames[0].shape[:2]
    size = (max(round(width * STRIP_SIDE / height), 1), STRIP_SIDE)
    row = np.concatenate(
        [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames], 1
    )
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What made a video: its device and the versions of the software."""
    name = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"tokentrim": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"machine": name, "versions": versions}


def tell_time(seconds: float) -> str:
    """`about 3 minutes`."""
    if seconds < 90:
        return f"about {max(round(seconds), 1)} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"


def print_progress(done: int, of: int) -> None:
    print(f"{done} of {of} batches are finished", file=sys.stderr, flush=True)
