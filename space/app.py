# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A page that shows a plain rollout drifting beside one that is held, while both are made.

    make app          # or `tokentrim app`, or `python app.py` in a Space

Environment variables: `TOKENTRIM_CHECKPOINT`, a folder or Hub id (default: the shipped worlds); `TOKENTRIM_MAX_CHUNKS`,
the limit of a run; `TOKENTRIM_FPS`; Gradio's `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`.
"""

import logging
import os
import signal


# Nothing leaves the machine. The libraries read these when they are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
try:
    import spaces  # noqa: F401  for the Hub's shared GPUs, which have to be asked before PyTorch is imported
except ImportError:
    pass

from pathlib import Path

import gradio as gr
from line import without_folders
from page import CSS, build
from visits import THREADS, App, Models

from tokentrim.tools.worlds import WORLDS


logger = logging.getLogger("tokentrim.app")
HERE = Path(__file__).resolve().parent


def find_checkpoints() -> dict[str, str]:
    """The checkpoint of the environment, or the shipped worlds, in a Space and in a clone."""
    if checkpoint := os.environ.get("TOKENTRIM_CHECKPOINT"):
        is_path = os.path.isabs(checkpoint) or os.path.isdir(checkpoint)
        name = os.path.basename(os.path.abspath(checkpoint)) if is_path else checkpoint  # all that visitors see
        return {name: checkpoint}
    folders = {name: [home / "checkpoints" / name for home in (HERE, HERE.parent)] for name in WORLDS}
    found = {name: next((str(each) for each in beside if each.exists()), None) for name, beside in folders.items()}
    return {name: folder for name, folder in found.items() if folder}


def load_app() -> App:
    """Build the app; the first model is loaded, so that a checkpoint that cannot be loaded is reported on the page."""
    checkpoints, fps = find_checkpoints(), os.environ.get("TOKENTRIM_FPS")
    name = next(iter(checkpoints), None)
    try:
        if name is None:
            raise ValueError("TOKENTRIM_CHECKPOINT must name a folder or a Hub id")
        limit = int(os.environ.get("TOKENTRIM_MAX_CHUNKS", 200))
        models = Models(checkpoints, limit, float(fps) if fps else None)
        models.get(name)
    except Exception as error:  # the page reports the error and still measures videos
        logger.error("the checkpoint could not be loaded", exc_info=error)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return App(None, without_folders(f"The checkpoint {name!r} could not be loaded: {reason}."))
    return App(models)


def launch(app: App) -> None:
    """Serve the page until Ctrl-C, without a share link and with system fonts."""
    sans = ["Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    page = build(app)
    _, address, _ = page.launch(
        share=False,
        quiet=True,
        theme=theme,
        css=CSS,
        footer_links=[],
        allowed_paths=[str(app.runs), str(app.example)],
        max_file_size="200mb",
        max_threads=THREADS,
        ssr_mode=False,
        prevent_thread_lock=True,
    )
    print(f"The page is at {address} on this machine. Ctrl-C ends it.", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folders of visitors are deleted
    page.block_thread()


if __name__ == "__main__":
    launch(load_app())
