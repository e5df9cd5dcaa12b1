# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The web page: a plain rollout drifts beside one that is held, while both are made.

    make app          # or `tokentrim app`, or `python app.py` in a Space

Environment variables: `TOKENTRIM_CHECKPOINT` (a folder or Hub id), `TOKENTRIM_MAX_CHUNKS`, `TOKENTRIM_FPS`, and Gradio's
`GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`.
"""

import logging
import os


# Nothing leaves the machine. Libraries read these variables at import.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
try:
    import spaces  # on the Hub's shared GPUs; import it before PyTorch
except ImportError:
    spaces = None

import atexit
import contextvars
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import world
from measure import measure
from runs import Change, Settings, Studio, ask_to_change, ask_to_stop, is_over

from tokentrim.tokentrim_session.prompts import TRANSITIONS
from tokentrim.tokentrim_views.registry import LAYOUTS


logger = logging.getLogger("tokentrim.app")
HERE = Path(__file__).resolve().parent
MISTAKES = (TypeError, ValueError, RuntimeError, OSError)  # errors whose messages are sentences
METHODS = [
    ("plain: as it was published", "plain"),
    ("TokenTrim: the paper", "tokentrim"),
    ("tokentrim_plus: ours", "tokentrim_plus"),
]
TINY_WORLD = "checkpoints/tiny-world"
LAYOUT_CHOICES = [("as the model was trained", ""), *(name for name in LAYOUTS if name != "window")]
CSS = """
#words .block { padding: 10px 6px; }
#words .secondary-wrap, #words input { padding: 0; }
#words .wrap-inner { padding: 4px 2px 4px 8px; }
#report table { width: auto; }
#report th, #report td { padding: 5px 12px; border-color: var(--border-color-primary); }
#report td:not(:first-child), #report th { white-space: nowrap; }
"""
WELCOME = """\
# TokenTrim, live

A causal video model makes a video chunk by chunk and reads its own past, so small errors add up and the picture drifts.
Press the button: one model makes the same video twice from the same noise, **left** as it was published and **right**
with a method against drift.
"""


@dataclass
class Visit:
    """The run of one visitor."""

    folder: Path
    settings: Settings
    made: int = 0


class App:
    """Actions of the page's buttons. Every visitor has at most one run, in a separate folder.

    Args:
        studio ([`Studio`], *optional*): `None` if the checkpoint could not be loaded.
        complaint (`str`): the reason.
    """

    def __init__(self, studio: Studio | None, complaint: str = ""):
        self.studio, self.complaint = studio, complaint
        self.visits: dict[str, Visit] = {}
        self.reports: dict[str, Path] = {}  # folders of measured drift
        self.thread = ThreadPoolExecutor(1)
        self.runs = Path(tempfile.mkdtemp(prefix="tokentrim-runs-")).resolve()
        atexit.register(shutil.rmtree, self.runs, ignore_errors=True)
        self.generate = studio and (spaces.GPU(duration=120)(studio.roll_out) if spaces else studio.roll_out)

    # Watch

    def prepare(
        self, prompt, seed, left, right, layout, num_chunks, next_prompt, next_chunk, transition, request: gr.Request
    ) -> None:
        """Check a visitor's request before it waits in the queue."""
        with sentences():
            self.require_studio()
            whole = all(isinstance(number, (int, float)) and number == int(number) for number in (seed, num_chunks))
            if not whole:
                raise ValueError("Seed and number of chunks must be whole numbers.")
            prompt = self.studio.check_prompt(prompt)
            settings = Settings(prompt, int(seed), left, right, layout or None, int(num_chunks))
            change = read_change(next_prompt, next_chunk, transition) if next_chunk else None
            self.studio.check(settings, change)
            self.leave(request)
            folder = self.runs / uuid.uuid4().hex
            folder.mkdir()
            if change is not None:
                ask_to_change(folder, change)
            self.visits[request.session_hash] = Visit(folder, settings)

    def watch(self, request: gr.Request) -> Iterator[dict]:
        """Make the videos of the visitor whose turn it is, and show them."""
        visit = self.visits.get(request.session_hash)
        if visit is None or not visit.folder.exists():
            return
        states = self.generate(visit.settings, visit.folder)
        try:
            with sentences():
                while (state := self.in_model_thread(next, states, None)) is not None:
                    visit.made = state["made"]
                    yield self.publish(state, visit.folder)
        except gr.Error:
            if visit.folder.exists():  # otherwise the visitor has left
                raise
        finally:
            self.in_model_thread(states.close)

    def in_model_thread(self, function: Callable, *arguments) -> Any:
        """A single thread makes all videos, because the memory of the server's own threads stays after they end."""
        return self.thread.submit(contextvars.copy_context().run, function, *arguments).result()

    def publish(self, state: dict, folder: Path) -> dict:
        """The state, with URLs instead of files."""

        def address(name: str) -> str:
            return f"gradio_api/file={folder / name}"

        sides = [{**side, "url": address(f"{side['name']}.mp4")} for side in state["sides"]]
        files = [{"name": name, "url": address(name)} for name in state.get("files", ())]
        return {**state, "run": folder.name, "sides": sides, "files": files}

    def stop(self, request: gr.Request) -> None:
        if visit := self.visits.get(request.session_hash):
            ask_to_stop(visit.folder)

    def leave(self, request: gr.Request) -> None:
        """A visitor starts again or has left: end the run and delete its folder."""
        if visit := self.visits.pop(request.session_hash, None):
            shutil.rmtree(visit.folder, ignore_errors=True)

    # Direct

    def change(self, prompt, chunk, transition, request: gr.Request) -> str:
        """Change the prompt of the visitor's run."""
        with sentences():
            self.require_studio()
            visit = self.visits.get(request.session_hash)
            if visit is None or is_over(visit.folder) or visit.made >= visit.settings.num_chunks:
                raise ValueError("No video of yours is running: press the button first.")
            change = read_change(prompt, chunk, transition)
            if change.chunk is not None and change.chunk < visit.made:
                raise ValueError(f"Chunk {change.chunk} is already finished: {visit.made} chunks are.")
            self.studio.check(visit.settings, change)
            ask_to_change(visit.folder, change)
        at = "the next chunk" if change.chunk is None else f"chunk {change.chunk}"
        return f"From {at} on: *{change.prompt}*"

    # Measure

    def measure(self, path: str | None, request: gr.Request) -> tuple:
        """Report, figure and numbers for a visitor's file."""
        with sentences():
            if path is None:
                raise ValueError("No video yet: drop one first.")
            folder = self.reports.setdefault(request.session_hash, self.runs / uuid.uuid4().hex)
            folder.mkdir(exist_ok=True)
            text, figure = measure(Path(path), folder / "drift.json")
        return text, figure, gr.DownloadButton(value=folder / "drift.json", visible=True)

    def forget(self, request: gr.Request) -> None:
        """A visitor has left: end the run and delete its files."""
        self.leave(request)
        if folder := self.reports.pop(request.session_hash, None):
            shutil.rmtree(folder, ignore_errors=True)

    def require_studio(self) -> None:
        if self.studio is None:
            raise ValueError(self.complaint)


class sentences:
    """Report an error as a sentence on the page, and with a traceback in the log."""

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if kind is None or not issubclass(kind, Exception) or issubclass(kind, gr.Error):
            return
        if issubclass(kind, MISTAKES):
            raise gr.Error(str(error), print_exception=False) from error
        logger.error("unexpected", exc_info=error)
        raise gr.Error("Something went wrong on the server; see its log.", print_exception=False) from error


def read_change(prompt: str, chunk: float | None, transition: str) -> Change:
    return Change(" ".join((prompt or "").split()), int(chunk) if chunk else None, transition)


def build(app: App) -> gr.Blocks:
    """Build the page."""
    studio = app.studio
    limit = studio.max_chunks if studio else 200
    speaks_tiny = studio is None or studio.is_tiny_world
    with gr.Blocks(title="TokenTrim, live", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(WELCOME)
        if app.complaint:
            gr.Markdown(f"**{app.complaint}** Measuring works.")
        with gr.Tab("Watch"), gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=330):
                prompt = gr.Textbox(world.EXAMPLES[0] if speaks_tiny else "", label="Prompt", lines=2, max_lines=4)
                if speaks_tiny:
                    with gr.Row(elem_id="words"):
                        chosen = [
                            gr.Dropdown(world.OBJECTS, value="red circle", label="Object", scale=5, min_width=120),
                            gr.Dropdown(world.DIRECTIONS, value="right", label="moves", scale=3, min_width=85),
                            gr.Dropdown(world.COLORS, value="blue", label="over", scale=3, min_width=85),
                        ]
                    for each in chosen:
                        each.input(world.make_sentence, chosen, prompt, queue=False, api_visibility="private")
                with gr.Row():
                    begin = gr.Button("Make both videos", variant="primary", elem_id="begin", scale=3, min_width=180)
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
                with gr.Accordion("Direct: change the prompt while it runs", open=False):
                    next_prompt = gr.Textbox(
                        "a red circle moving right over a green background" if speaks_tiny else "",
                        label="New prompt",
                        lines=2,
                    )
                    with gr.Row():
                        transition = gr.Dropdown(TRANSITIONS, value="cut", label="Transition", min_width=120)
                        next_chunk = gr.Number(0, label="From chunk (0: the next)", precision=0, min_width=120)
                    change = gr.Button("Change the prompt", elem_id="change")
                    told = gr.Markdown(
                        "If you set a chunk before the start, the prompt changes there automatically.",
                        elem_id="told",
                    )
                with gr.Accordion("More settings", open=False):
                    left = gr.Dropdown(METHODS, value="plain", label="Left")
                    right = gr.Dropdown(METHODS, value="tokentrim_plus", label="Right")
                    layout = gr.Dropdown(LAYOUT_CHOICES, value="", label="Layout: which past frames are read")
                    num_chunks = gr.Slider(2, limit, value=min(40, limit), step=1, label="Length in chunks")
                    seed = gr.Number(0, label="Seed", precision=0)
                if speaks_tiny:
                    gr.Examples([[each] for each in world.EXAMPLES], prompt, label="Examples")
            with gr.Column(scale=9, min_width=340):
                stage = gr.HTML(
                    {},
                    html_template=(HERE / "stage.html").read_text(),
                    css_template=(HERE / "stage.css").read_text(),
                    js_on_load=(HERE / "stage.js").read_text(),
                    apply_default_css=False,
                    elem_id="stage",
                )
        with gr.Tab("Measure"):
            gr.Markdown("Drop a video of any model. The report measures its drift from the frames alone.")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=330):
                    video = gr.File(label="Video", file_types=[".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"])
                    measured = gr.Button("Measure its drift", variant="primary", elem_id="measure")
                with gr.Column(scale=9, min_width=340):
                    report = gr.Markdown(elem_id="report")
                    figure = gr.Plot(show_label=False, elem_id="figure")
                    numbers = gr.DownloadButton("drift.json", visible=False)

        # Gradio shows errors of queued events only; events that do not use the model never wait.
        asked = [prompt, seed, left, right, layout, num_chunks, next_prompt, next_chunk, transition]
        buttons = [begin, stop]
        ready = begin.click(app.prepare, asked, None, concurrency_limit=None, api_name="prepare")
        runs = ready.success(lambda: set_buttons(True), None, buttons, queue=False, api_visibility="private").then(
            app.watch, None, stage, concurrency_id="model", show_progress="minimal", api_name="watch"
        )
        runs.then(lambda: set_buttons(False), None, buttons, queue=False, api_visibility="private")
        stop.click(app.stop, None, None, queue=False, api_name="stop")
        change.click(
            app.change, [next_prompt, next_chunk, transition], told, concurrency_limit=None, api_name="change"
        )
        measured.click(app.measure, video, [report, figure, numbers], concurrency_id="measure", api_name="measure")
        page.unload(app.forget)
    return page.queue(default_concurrency_limit=1, max_size=32)


def set_buttons(is_running: bool) -> tuple:
    return gr.Button(interactive=not is_running), gr.Button(interactive=is_running)


def load_app() -> App:
    """Build the app with the checkpoint of the environment, or with the shipped tiny world."""
    beside = [folder / TINY_WORLD for folder in (HERE, HERE.parent)]  # in a Space, and in a clone
    checkpoint, name = os.environ.get("TOKENTRIM_CHECKPOINT"), None
    if not checkpoint and (found := [folder for folder in beside if folder.exists()]):
        checkpoint, name = str(found[0]), TINY_WORLD
    fps = os.environ.get("TOKENTRIM_FPS")
    try:
        if not checkpoint:
            raise ValueError("TOKENTRIM_CHECKPOINT must name a folder or a Hub id")
        limit = int(os.environ.get("TOKENTRIM_MAX_CHUNKS", 200))
        studio = Studio(checkpoint, limit, float(fps) if fps else None, name)
    except Exception as error:  # the page reports the error and still measures videos
        logger.error("the checkpoint could not be loaded", exc_info=error)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return App(None, f"The checkpoint {checkpoint!r} could not be loaded: {reason}.")
    return App(studio)


def launch(app: App, **options) -> tuple:
    """Serve the page, without a share link and with system fonts."""
    sans = ["Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    return build(app).launch(
        share=False,
        theme=theme,
        css=CSS,
        footer_links=[],
        allowed_paths=[str(app.runs)],
        max_file_size="200mb",
        ssr_mode=False,
        **options,
    )


if __name__ == "__main__":
    launch(load_app())
