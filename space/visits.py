# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the page's buttons do: one run for each visitor, in turn, on the model that the visitor picked."""

import atexit
import contextvars
import json
import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
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
        self.lock = threading.Lock()

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
        self.visits: dict[str, Visit] = {}
        self.line: list[Visit] = []  # whose turn it is, and who waits
        self.reports: dict[str, Path] = {}  # folders of measured drift
        self.thread = ThreadPoolExecutor(1)
        self.runs = Path(tempfile.mkdtemp(prefix="tokentrim-runs-")).resolve()
        atexit.register(shutil.rmtree, self.runs, ignore_errors=True)

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
            visit = self.admit(
                model, prompt, seed, left, right, layout, num_chunks, next_prompt, next_chunk, transition, request
            )
            yield from self.wait_for_turn(visit)
            yield from self.make(visit)
        except Exception as error:
            if visit is None or visit.folder.exists():  # otherwise the visitor has left
                yield {"status": "error", "message": sentence_of(error)}
        finally:
            if visit in self.line:
                self.line.remove(visit)

    def admit(
        self, model, prompt, seed, left, right, layout, num_chunks, next_prompt, next_chunk, transition, request
    ) -> Visit:
        """Check a request, and put the visitor at the end of the line."""
        studio = self.require_models().get(model)
        if not all(isinstance(number, (int, float)) and number == int(number) for number in (seed, num_chunks)):
            raise ValueError("Seed and number of chunks must be whole numbers.")
        prompt = studio.check_prompt(prompt)
        settings = Settings(prompt, int(seed), left, right, layout or None, int(num_chunks))
        change = read_change(next_prompt, next_chunk, transition) if next_chunk else None
        studio.check(settings, change)
        self.leave(request)
        folder = self.runs / uuid.uuid4().hex
        folder.mkdir()
        if change is not None:
            ask_to_change(folder, change)
        visit = self.visits[request.session_hash] = Visit(folder, studio, settings)
        self.line.append(visit)
        return visit

    def wait_for_turn(self, visit: Visit) -> Iterator[dict]:
        """One run at a time; meanwhile, the stage says how many visitors are before."""
        told = None
        while visit.folder.exists() and not is_over(visit.folder) and (ahead := self.line.index(visit)) > 0:
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

    def leave(self, request: gr.Request) -> None:
        """A visitor starts again or has left: end the run and delete its folder."""
        if visit := self.visits.pop(request.session_hash, None):
            shutil.rmtree(visit.folder, ignore_errors=True)

    # Direct

    def change(self, prompt: str, chunk: float, transition: str, request: gr.Request) -> str:
        """Change the prompt of the visitor's run."""
        with sentences():
            self.require_models()
            visit = self.visits.get(request.session_hash)
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
            folder = self.reports.setdefault(request.session_hash, self.runs / uuid.uuid4().hex)
            folder.mkdir(exist_ok=True)
            text, figure = measure([Path(path) for path in paths], folder / "drift.json")
        return text, figure, gr.DownloadButton(value=folder / "drift.json", visible=True)

    def forget(self, request: gr.Request) -> None:
        """A visitor has left: end the run and delete its files."""
        self.leave(request)
        if folder := self.reports.pop(request.session_hash, None):
            shutil.rmtree(folder, ignore_errors=True)

    def require_models(self) -> Models:
        if self.models is None:
            raise ValueError(self.complaint)
        return self.models


def publish(state: dict, folder: Path) -> dict:
    """The state, with URLs instead of files."""

    def address(name: str) -> str:
        return f"gradio_api/file={folder / name}"

    sides = [{**side, "url": address(f"{side['name']}.mp4")} for side in state["sides"]]
    files = [{"name": name, "url": address(name)} for name in state.get("files", ())]
    return {**state, "run": folder.name, "sides": sides, "files": files}


def finished_example() -> dict:
    """A finished run that ships with the page, for its first screen."""
    path = EXAMPLE / "state.json"
    return publish(json.loads(path.read_text()), EXAMPLE) if path.exists() else {}


def sentence_of(error: Exception) -> str:
    """What the stage says of an error; what nobody expected goes to the log with its traceback."""
    if isinstance(error, MISTAKES):
        return str(error)
    logger.error("unexpected", exc_info=error)
    return "Something went wrong on the server; see its log."


class sentences:
    """Report an error of a button beside the stage as a message on the page."""

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, Exception):
            raise gr.Error(sentence_of(error), print_exception=False) from error


def read_change(prompt: str, chunk: float | None, transition: str) -> Change:
    return Change(" ".join((prompt or "").split()), int(chunk) if chunk else None, transition)
