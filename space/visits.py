# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the page's buttons do: one run for each visitor, in turn, on the model that the visitor picked."""

import atexit
import contextvars
import json
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from line import Line, Visitor, find_address, is_old, without_folders
from measure import measure
from runs import Change, Settings, Studio, ask_to_change, ask_to_stop, is_over

from tokentrim.tools.worlds import WORLDS


try:
    import spaces  # on the Hub's shared GPUs
except ImportError:
    spaces = None

logger = logging.getLogger("tokentrim.app")
EXAMPLE = Path(__file__).resolve().parent / "example"
MISTAKES = (TypeError, ValueError, RuntimeError, OSError)  # errors whose messages are sentences
POLL = 0.3  # seconds between two looks at the line
THREADS = 40  # of the server
PLACES = (
    24,
    8,
)  # in the lines for videos and for measurements; each waits in one of the threads, and the first needs one


@dataclass(eq=False)
class Visit:
    """The run of one visitor."""

    folder: Path
    studio: Studio
    settings: Settings
    made: int = 0


class Models:
    """The models that a visitor can pick, each loaded when it is first asked for.

    Args:
        checkpoints (`dict[str, str]`): folder or Hub id by name; the first is shown.
        max_chunks (`int`): limit of a run.
        fps (`float`, *optional*): frames per second; by default the model's.
    """

    def __init__(self, checkpoints: dict[str, str], max_chunks: int = 200, fps: float | None = None):
        self.checkpoints, self.max_chunks, self.fps = checkpoints, max_chunks, fps
        self.loaded: dict[str, Studio] = {}
        self.lock = Lock()

    def get(self, name: str) -> Studio:
        with self.lock:
            if name not in self.checkpoints:
                raise ValueError(f"There is no model {name!r} here: pick one of {', '.join(self.checkpoints)}.")
            if name not in self.loaded:
                shown = f"checkpoints/{name}" if name in WORLDS else name
                self.loaded[name] = Studio(self.checkpoints[name], self.max_chunks, self.fps, shown)
            return self.loaded[name]


class App:
    """Actions of the page's buttons. Every visitor has at most one run, in a separate folder.

    Args:
        models ([`Models`], *optional*): `None` if the checkpoint could not be loaded.
        complaint (`str`): the reason.
    """

    def __init__(self, models: Models | None, complaint: str = ""):
        self.models, self.complaint = models, complaint
        self.visits: dict[str, Visit] = {}  # by session
        self.reports: dict[str, Path] = {}  # folders of measured drift, by session
        self.line, self.measuring = map(Line, PLACES)
        self.thread = ThreadPoolExecutor(1)
        self.runs = make_folder("runs")
        self.example = shutil.copytree(EXAMPLE, make_folder("example"), dirs_exist_ok=True)  # its URLs name no clone

    # Watch

    def watch(
        self,
        model: str,
        prompt: str,
        seed: float,
        left: str,
        right: str,
        layout: str,
        num_chunks: float,
        next_prompt: str,
        next_chunk: float,
        transition: str,
        request: gr.Request,
    ) -> Iterator[dict]:
        """Make both videos when it is the visitor's turn; yields what the stage shows, errors included."""
        visit = None
        try:
            yield {"status": "notice", "message": "Looking at your request ..."}
            visitor, studio = read_visitor(request), self.require_models().get(model)
            numbers = [read_whole(number) for number in (seed, num_chunks)]
            settings = Settings(studio.check_prompt(prompt), numbers[0], left, right, layout or None, numbers[1])
            change = read_change(next_prompt, next_chunk, transition) if next_chunk else None
            studio.check(settings, change)
            with self.line.place(visitor):
                visit = self.open_visit(visitor, studio, settings, change)
                yield from self.wait_for_turn(visitor, visit)
                yield from self.make(visit)
        except Exception as error:
            if visit is None or visit.folder.exists():  # otherwise the visitor has left
                yield {"status": "error", "message": sentence_of(error)}

    def open_visit(self, visitor: Visitor, studio: Studio, settings: Settings, change: Change | None) -> Visit:
        """A new folder for a visitor, instead of the earlier one."""
        self.sweep()
        self.leave(visitor.session)
        visit = self.visits[visitor.session] = Visit(self.runs / uuid.uuid4().hex, studio, settings)
        visit.folder.mkdir()
        if change is not None:
            ask_to_change(visit.folder, change)
        return visit

    def wait_for_turn(self, visitor: Visitor, visit: Visit) -> Iterator[dict]:
        """One run at a time; meanwhile, the stage says how many visitors are before."""
        told = None
        while visit.folder.exists() and not is_over(visit.folder) and (ahead := self.line.num_before(visitor)) > 0:
            if ahead != told:
                told = ahead
                runs = "One video is" if ahead == 1 else f"{ahead} videos are"
                yield {"status": "notice", "message": f"{runs} made before yours. It starts by itself."}
            time.sleep(POLL)

    def make(self, visit: Visit) -> Iterator[dict]:
        """The states of a run."""
        roll_out = visit.studio.roll_out
        states = (spaces.GPU(duration=120)(roll_out) if spaces else roll_out)(visit.settings, visit.folder)
        try:
            while visit.folder.exists() and (state := self.in_model_thread(next, states, None)) is not None:
                visit.made = state["made"]
                yield publish(state, visit.folder)
        finally:
            self.in_model_thread(states.close)

    def in_model_thread(self, function: Callable, *arguments) -> Any:
        """A single thread makes all videos, because the memory of the server's own threads stays after they end."""
        return self.thread.submit(contextvars.copy_context().run, function, *arguments).result()

    def stop(self, request: gr.Request) -> None:
        if visit := self.visits.get(request.session_hash):
            ask_to_stop(visit.folder)

    def leave(self, session: str) -> None:
        """A visitor starts again or has left: end the run and delete its folder."""
        if visit := self.visits.pop(session, None):
            shutil.rmtree(visit.folder, ignore_errors=True)

    # Direct

    def change(self, prompt: str, chunk: float, transition: str, request: gr.Request) -> str:
        """Change the prompt of the visitor's run."""
        with sentences():
            self.require_models()
            visit = self.visits.get(read_visitor(request).session)
            if visit is None or is_over(visit.folder) or visit.made >= visit.settings.num_chunks:
                raise ValueError("No video of yours is running: press the button first.")
            change = read_change(prompt, chunk, transition)
            if change.chunk is not None and change.chunk < visit.made:
                raise ValueError(f"Chunk {change.chunk} is already finished: {visit.made} chunks are.")
            visit.studio.check(visit.settings, change)
            ask_to_change(visit.folder, change)
        at = "the next chunk" if change.chunk is None else f"chunk {change.chunk}"
        return f"From {at} on: *{change.prompt}*"

    # Measure

    def measure(self, paths: list[str] | None, request: gr.Request) -> tuple:
        """Report, figure and numbers for one or two files of a visitor."""
        with sentences():
            if not paths:
                raise ValueError("No video yet: drop one or two first.")
            if len(paths) > 2:
                raise ValueError(f"Up to two videos are compared, but there are {len(paths)}.")
            visitor = read_visitor(request)
            with self.measuring.place(visitor):
                self.sweep()
                folder = self.reports.setdefault(visitor.session, self.runs / uuid.uuid4().hex)
                folder.mkdir(exist_ok=True)
                while self.measuring.num_before(visitor) > 0 and folder.exists():
                    time.sleep(POLL)
                text, figure = measure([Path(path) for path in paths], folder / "drift.json")
        return text, figure, gr.DownloadButton(value=folder / "drift.json", visible=True)

    def forget(self, request: gr.Request) -> None:
        """A visitor has left: end the run and delete its files."""
        self.leave(request.session_hash)
        if folder := self.reports.pop(request.session_hash, None):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete the old files of visitors who wait for nothing: a program never says that it has left."""
        waiting = {visitor.session for line in (self.line, self.measuring) for visitor in list(line.visitors)}
        for session, visit in list(self.visits.items()):
            if session not in waiting and is_old(visit.folder):
                self.leave(session)
        for session, folder in list(self.reports.items()):
            if session not in waiting and is_old(folder):
                shutil.rmtree(self.reports.pop(session), ignore_errors=True)

    def require_models(self) -> Models:
        if self.models is None:
            raise ValueError(self.complaint)
        return self.models


def make_folder(name: str) -> Path:
    """A temporary folder of this server; it is deleted when the server ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"tokentrim-{name}-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def publish(state: dict, folder: Path) -> dict:
    """The state, with URLs instead of files."""

    def address(name: str) -> str:
        return f"gradio_api/file={folder / name}"

    sides = [{**side, "url": address(f"{side['name']}.mp4")} for side in state["sides"]]
    files = [{"name": name, "url": address(name)} for name in state.get("files", ())]
    return {**state, "run": folder.name, "sides": sides, "files": files}


def finished_example(folder: Path) -> dict:
    """A finished run that ships with the page, for its first screen."""
    return publish(json.loads((folder / "state.json").read_text()), folder)


def sentence_of(error: Exception) -> str:
    """What the stage says about an error; an unexpected error is logged with its traceback."""
    if isinstance(error, MISTAKES):
        return without_folders(str(error))
    logger.error("unexpected", exc_info=error)
    return "Something went wrong on the server; see its log."


class sentences:
    """Report an error of a button beside the stage as a message on the page."""

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, Exception):
            raise gr.Error(sentence_of(error), print_exception=False) from error


def read_visitor(request: gr.Request) -> Visitor:
    client = request.client.host if request.client else ""
    return Visitor(request.session_hash, find_address(client, request.headers.get("x-forwarded-for", "")))


def read_whole(number: float) -> int:
    if not (isinstance(number, int) or (isinstance(number, float) and number.is_integer())):
        raise ValueError(f"Seed, length and chunk must be whole numbers, but one is {number!r}.")
    return int(number)


def read_change(prompt: str, chunk: float | None, transition: str) -> Change:
    return Change(" ".join((prompt or "").split()), read_whole(chunk) if chunk else None, transition)
