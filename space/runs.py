# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Two videos from one noise, chunk by chunk, in a visitor's folder. This module does not use Gradio.

A run lives as long as its folder. Page and run communicate through the folder only, so the run may be in another process:
`left.mp4` and `right.mp4` grow in it, a file `stop` ends the run, lines of `changes.jsonl` change its prompt, and removing
the folder ends it.
"""

import copy
import inspect
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokentrim import __version__
from tokentrim.tokentrim_frames.colors import ColorMeter
from tokentrim.tokentrim_frames.mp4 import VideoWriter
from tokentrim.tokentrim_frames.output import as_uint8, decision_event
from tokentrim.tokentrim_frames.summary import list_events
from tokentrim.tools.loading import load_checkpoint
from tokentrim.tools.worlds import WORLDS, unknown_words


SIDES = ("left", "right")
MAX_PROMPT = 500  # characters
STOP, CHANGES = "stop", "changes.jsonl"


@dataclass(frozen=True)
class Change:
    """A new prompt from `chunk` on; `None` is the next chunk."""

    prompt: str
    chunk: int | None
    transition: str


@dataclass(frozen=True)
class Settings:
    """The request of a visitor."""

    prompt: str
    seed: int
    left: str  # methods
    right: str
    layout: str | None
    num_chunks: int


class Studio:
    """A checkpoint, loaded as two pipelines that share weights, because a transformer serves one run at a time.

    Args:
        checkpoint (`str`): folder or Hub id, in Diffusers format.
        max_chunks (`int`): limit of a run.
        fps (`float`, *optional*): frames per second; by default the checkpoint's.
        name (`str`, *optional*): name of the checkpoint in the scripts for visitors.

    Raises:
        `OSError`, `ValueError`: not a checkpoint.
    """

    def __init__(self, checkpoint: str, max_chunks: int, fps: float | None = None, name: str | None = None):
        on_gpu = torch.cuda.is_available()
        self.name, self.max_chunks = name or checkpoint, max_chunks
        self.options = {"dtype": torch.bfloat16} if on_gpu else {}
        pipe = load_checkpoint(checkpoint, **self.options).to("cuda" if on_gpu else "cpu")
        self.pipes = {"left": pipe, "right": make_twin(pipe)}
        for each in self.pipes.values():
            each.set_progress_bar_config(disable=True)
        self.pool = ThreadPoolExecutor(len(SIDES))  # options of ffmpeg
        self.world = WORLDS.get(Path(checkpoint).name)  # `None` for other models
        self.fps = fps or pipe.fps
        if self.world:
            torch.set_num_threads(1)  # more threads slow down a model this small

    def check_prompt(self, prompt: str) -> str:
        """Strip the prompt; raises `ValueError` with a sentence for the page."""
        prompt = " ".join((prompt or "").split())
        if not prompt:
            raise ValueError("The prompt is empty: describe the video.")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"The prompt has {len(prompt)} characters; the limit is {MAX_PROMPT}.")
        if unknown := unknown_words(self.pipes["left"].tokenizer, prompt):
            words = ", ".join(f"'{word[:30]}'" for word in unknown[:5])
            raise ValueError(f"This model does not know {words}. The examples show what it knows.")
        return prompt

    def check(self, settings: Settings, change: Change | None = None) -> None:
        """Raise `TypeError` or `ValueError` with a sentence if the settings are invalid; no model runs."""
        self.check_prompt(settings.prompt)
        if not 1 <= settings.num_chunks <= self.max_chunks:
            raise ValueError(f"A video can have 1 to {self.max_chunks} chunks here, not {settings.num_chunks}.")
        if not 0 <= settings.seed < 2**63:
            raise ValueError(f"The seed must be 0 or more and below 2^63, but is {settings.seed}.")
        schedule = {}
        if change is not None:
            self.check_prompt(change.prompt)
            if change.chunk is not None and not 1 <= change.chunk < settings.num_chunks:
                last = settings.num_chunks - 1
                raise ValueError(f"The prompt can change at chunks 1 to {last} of this video, not at {change.chunk}.")
            schedule = {"prompt_schedule": {1: change.prompt}, "prompt_transition": change.transition}
        for side in SIDES:
            self.pipes[side].plan(settings.prompt, method=getattr(settings, side), layout=settings.layout, **schedule)

    def roll_out(self, settings: Settings, folder: Path) -> Iterator[dict]:
        """
        Make both videos, one chunk of each at a time, until they are complete, stopped, or their folder is removed.

        Args:
            settings ([`Settings`]): checked settings.
            folder (`Path`): folder of this run only.

        Returns:
            `Iterator[dict]`: the whole state for the page after each chunk, in plain types.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state, inbox, changes = begin_state(self, settings), Inbox(folder), {}
        with ExitStack() as stack:
            streams = [stack.enter_context(self.start(side, settings)) for side in SIDES]
            writers = [VideoWriter(folder / f"{side}.mp4", self.fps) for side in SIDES]
            state["grid"], clock = list(streams[0].grid), Clock()
            meters = [ColorMeter(self.world.top if self.world else 1.0) for _ in SIDES]
            yield state
            for index in range(settings.num_chunks):
                for change in inbox.due(index):
                    changes[index] = change
                    for stream in streams:
                        stream.set_prompt(change.prompt, transition=change.transition)
                chunks = [next(stream) for stream in streams if not is_over(folder)]
                if len(chunks) < len(streams):
                    break
                frames = [as_uint8(chunk.frames[0]) for chunk in chunks]
                list(self.pool.map(VideoWriter.write, writers, frames))
                state = add_chunks(state, chunks, frames, writers, meters) | clock.tell(len(frames[0]))
                state["prompts"] = [[0, settings.prompt], *([at, each.prompt] for at, each in changes.items())]
                yield state
        if folder.exists():
            files = self.write_files(settings, changes, state, folder) if state["made"] else []
            yield {**state, "status": "done" if state["made"] == settings.num_chunks else "stopped", "files": files}

    def start(self, side: str, settings: Settings) -> Any:
        """The stream of one side; it ends when its iterator is closed."""
        generator = torch.Generator().manual_seed(settings.seed)
        method, layout = getattr(settings, side), settings.layout
        stream = self.pipes[side].stream(
            settings.prompt, num_frames=None, method=method, layout=layout, generator=generator
        )
        stream.run.shows_steps = False
        return stream

    def write_files(self, settings: Settings, changes: dict[int, Change], state: dict, folder: Path) -> list[str]:
        """Write the decisions, the settings, and the Python that makes the same videos."""
        decisions = {side["name"]: side["chunks"] for side in state["sides"]}
        versions = {"tokentrim": __version__, "torch": torch.__version__}
        record = {
            **asdict(settings),
            "num_frames": state["num_frames"],
            "fps": self.fps,
            "changes": {at: {"prompt": each.prompt, "transition": each.transition} for at, each in changes.items()},
            "checkpoint": self.name,
            "versions": versions,
        }
        (folder / "decisions.json").write_text(json.dumps(decisions) + "\n")
        (folder / "settings.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "make_videos.py").write_text(self.make_script(settings, changes, state["num_frames"]))
        return ["left.mp4", "right.mp4", "decisions.json", "settings.json", "make_videos.py"]

    def make_script(self, settings: Settings, changes: dict[int, Change], num_frames: int) -> str:
        """Ten lines of Python that write the same two files, byte for byte."""
        arguments = [f"num_frames={num_frames}", "method=method", "generator=generator"]
        if settings.layout is not None:
            arguments.append(f"layout={quoted(settings.layout)}")
        if changes:
            prompts = ", ".join(f"{at}: {quoted(each.prompt)}" for at, each in changes.items())
            transitions = ", ".join(f"{at}: {quoted(each.transition)}" for at, each in changes.items())
            arguments += [f"prompt_schedule={{{prompts}}}", f"prompt_transition={{{transitions}}}"]
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        rate = "" if self.fps == self.pipes["left"].fps else f", fps={self.fps}"
        return f"""\
import torch
from tokentrim import TokenTrimPipeline

torch.set_num_threads({torch.get_num_threads()})
pipe = TokenTrimPipeline.from_pretrained({quoted(self.name)}{options}){'.to("cuda")' if self.options else ""}
prompt = {quoted(settings.prompt)}
for name, method in {{"left": {quoted(settings.left)}, "right": {quoted(settings.right)}}}.items():
    generator = torch.Generator().manual_seed({settings.seed})
    with pipe.stream(prompt, {", ".join(arguments)}) as stream:
        stream.save_video(f"{{name}}.mp4"{rate})
"""


def quoted(text: str) -> str:
    """A Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def make_twin(pipe: Any) -> Any:
    """A second pipeline with separate modules that share the tensors."""
    transformer = pipe.transformer
    shared = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
    components = {
        **pipe.components,
        "transformer": copy.deepcopy(transformer, shared),
        "scheduler": copy.deepcopy(pipe.scheduler),
    }
    names = set(inspect.signature(type(pipe).__init__).parameters) - {"self", *components}
    return type(pipe)(**components, **{name: pipe.config[name] for name in names})


def begin_state(studio: Studio, settings: Settings) -> dict:
    """The state before the first chunk."""
    return {
        "status": "running",
        "fps": studio.fps,
        "planned": settings.num_chunks,
        "top": studio.world.top if studio.world else 1.0,
        "made": 0,
        "num_frames": 0,
        "prompts": [[0, settings.prompt]],
        "sides": [{"name": side, "method": getattr(settings, side), "bytes": 0, "chunks": []} for side in SIDES],
    }


def add_chunks(state: dict, chunks: list, frames: list, writers: list, meters: list) -> dict:
    """The state with one more chunk of both videos; the old state is not modified."""
    sides = []
    for side, chunk, video, writer, meter in zip(state["sides"], chunks, frames, writers, meters):
        known = describe(chunk.decisions[0], len(video), meter.add(video))
        sides.append({**side, "bytes": writer.state["bytes"], "chunks": [*side["chunks"], known]})
    return {
        **state,
        "made": state["made"] + 1,
        "num_frames": state["num_frames"] + len(frames[0]),
        "size": list(frames[0].shape[1:3]),
        "sides": sides,
    }


def describe(decision: dict, num_frames: int, drift: float) -> dict:
    """One chunk of one video, for the charts: its decision, and how far its colors are from the start (0 to 100)."""
    numbers = {name: decision[name] for name in ("severity", "threshold", "regenerated_severity")}
    return {
        **{name: None if value is None else round(value, 4) for name, value in numbers.items()},
        "drift": round(drift, 2),
        "events": list_events(decision),
        "event": decision_event(decision),
        "tokens": decision["tokens"],
        "frames": num_frames,
    }


# Messages between the page and a run


def ask_to_stop(folder: Path) -> None:
    if folder.exists():
        (folder / STOP).touch()


def is_over(folder: Path) -> bool:
    return not folder.exists() or (folder / STOP).exists()


def ask_to_change(folder: Path, change: Change) -> None:
    with (folder / CHANGES).open("a") as file:
        file.write(json.dumps(asdict(change)) + "\n")


class Inbox:
    """The changes that a visitor requests during the run."""

    def __init__(self, folder: Path):
        self.path, self.num_read, self.waiting = folder / CHANGES, 0, []

    def due(self, index: int) -> list[Change]:
        """Changes due before chunk `index`, each once; none before the first chunk."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.waiting += [Change(**json.loads(line)) for line in lines[self.num_read :]]
        self.num_read = len(lines)
        due = [each for each in self.waiting if index > 0 and (each.chunk or 0) <= index]
        self.waiting = [each for each in self.waiting if each not in due]
        return due


class Clock:
    """Recent speed of one video in frames per second."""

    def __init__(self):
        self.begin = time.perf_counter()
        self.ends = deque([self.begin], maxlen=9)

    def tell(self, num_frames: int) -> dict:
        """Add a chunk of `num_frames` frames; returns frames per second, and seconds since the start."""
        self.ends.append(time.perf_counter())
        rate = num_frames * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])
        return {"rate": round(rate, 2), "seconds": round(self.ends[-1] - self.begin, 2)}
