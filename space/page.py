# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The page: what stands where, and which button does what."""

from pathlib import Path

import gradio as gr
from visits import App, finished_example

from tokentrim.tokentrim_session.prompts import TRANSITIONS
from tokentrim.tokentrim_views.registry import LAYOUTS, WITH_LABELS
from tokentrim.tools.worlds import WORLDS, World


HERE = Path(__file__).resolve().parent
METHODS = [
    ("plain: as it was published", "plain"),
    ("TokenTrim: the paper", "tokentrim"),
    ("tokentrim_plus: ours", "tokentrim_plus"),
]
LAYOUT_CHOICES = [
    ("as the model was trained", ""),
    *(name for name in LAYOUTS if name not in ("window", *WITH_LABELS)),
]
NUM_WORDS = max(len(world.words) for world in WORLDS.values())
CSS = """
#examples button { text-align: left; }
#words .block { padding: 10px 6px; }
#words .secondary-wrap, #words input { padding: 0; }
#words .wrap-inner { padding: 4px 2px 4px 8px; }
@media (max-width: 768px) {
  #shown { order: -1; }
  #words .icon-wrap { display: none; }
}
#report table { width: auto; }
#report th, #report td { padding: 5px 12px; border-color: var(--border-color-primary); }
#report td:not(:first-child), #report th { white-space: nowrap; }
#report td:first-child { overflow-wrap: normal; word-break: normal; min-width: 92px; }
@media (max-width: 640px) { #report th, #report td { padding: 5px 6px; font-size: 13px; } }
#figure { overflow-x: auto; }
#figure img { min-width: 640px; width: 100%; }
.dark #figure .for-light, #figure .for-dark { display: none; }
.dark #figure .for-dark { display: block; }
"""
WELCOME = """\
# TokenTrim, live

A causal video model makes a video chunk by chunk and reads its own past, so small errors add up and the picture drifts.
Here one model makes the same video twice from the same noise: **left** as it was published, **right** with a method
against drift. Below is a finished one; the button makes yours.
"""
NO_MODEL = "**{}** You can still measure videos."


def build(app: App) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="TokenTrim, live", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(WELCOME)
        if app.complaint:
            gr.Markdown(NO_MODEL.format(app.complaint), elem_id="complaint")
        with gr.Tab("Watch"), gr.Row(equal_height=False):
            build_watch(app)
        with gr.Tab("Measure"):
            build_measure(app)
        page.unload(app.forget)
    return page.queue(default_concurrency_limit=1, max_size=32)


def build_watch(app: App) -> None:
    names = list(app.models.checkpoints) if app.models else []
    first = WORLDS.get(names[0]) if names else None
    limit = app.models.max_chunks if app.models else 200
    with gr.Column(scale=4, min_width=330):
        titles = [(WORLDS[name].title if name in WORLDS else name, name) for name in names]
        model = gr.Dropdown(titles, value=names[0] if names else None, label="World", visible=len(names) > 1)
        prompt = gr.Textbox(first.examples[0] if first else "", label="Prompt", lines=2, max_lines=4)
        with gr.Row(elem_id="words", visible=first is not None):
            words = [gr.Dropdown(**settings, min_width=80) for settings in list_words(first)]
        with gr.Row():
            begin = gr.Button(
                "Make both videos",
                variant="primary",
                elem_id="begin",
                scale=3,
                min_width=180,
                interactive=app.models is not None,
            )
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
        samples = [[example] for example in first.examples] if first else [[""]]
        examples = gr.Dataset(
            components=[prompt], samples=samples, label="Examples", elem_id="examples", visible=first is not None
        )
        with gr.Accordion("Direct: change the prompt while it runs", open=False):
            next_prompt = gr.Textbox(first.examples[-1] if first else "", label="New prompt", lines=2)
            with gr.Row():
                transition = gr.Dropdown(TRANSITIONS, value="cut", label="Transition", min_width=120)
                next_chunk = gr.Number(0, label="From chunk (0: the next)", precision=0, min_width=120)
            change = gr.Button("Change the prompt", elem_id="change", interactive=app.models is not None)
            told = gr.Markdown(
                "If you set a chunk before the start, the prompt changes there automatically.", elem_id="told"
            )
        with gr.Accordion("More settings", open=False):
            left = gr.Dropdown(METHODS, value="plain", label="Left")
            right = gr.Dropdown(METHODS, value="tokentrim_plus", label="Right")
            layout = gr.Dropdown(LAYOUT_CHOICES, value="", label="Layout: which past frames are read")
            length = min(first.chunks if first else 60, limit)
            num_chunks = gr.Slider(2, limit, value=length, step=1, label="Length in chunks")
            seed = gr.Number(0, label="Seed", precision=0)
    with gr.Column(scale=9, min_width=340, elem_id="shown"):
        stage = gr.HTML(
            finished_example(app.example),
            html_template=(HERE / "stage.html").read_text(),
            css_template=(HERE / "stage.css").read_text(),
            js_on_load=(HERE / "stage.js").read_text(),
            apply_default_css=False,
            elem_id="stage",
        )
    if first:
        of_world = [prompt, *words, examples, next_prompt, num_chunks]
        model.input(lambda name: describe_world(name, limit), model, of_world, queue=False, api_visibility="private")
        for each in words:
            each.input(choose_words, [model, *words], prompt, queue=False, api_visibility="private")
        examples.click(lambda sample: sample[0], examples, prompt, queue=False, api_visibility="private")

    asked = [model, prompt, seed, left, right, layout, num_chunks, next_prompt, next_chunk, transition]
    buttons = [begin, stop]
    busy = begin.click(lambda: set_buttons(True), None, buttons, queue=False, api_visibility="private")
    runs = busy.then(app.watch, asked, stage, concurrency_limit=None, show_progress="hidden", api_name="watch")
    runs.then(lambda: set_buttons(False), None, buttons, queue=False, api_visibility="private")
    stop.click(app.stop, None, None, queue=False, api_name="stop")
    change.click(app.change, [next_prompt, next_chunk, transition], told, concurrency_limit=None, api_name="change")


def build_measure(app: App) -> None:
    gr.Markdown(
        "Drop a video of any model, or two to compare. The report measures their drift from the frames alone: "
        "nothing is uploaded to anyone but this server."
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=330):
            endings = [".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"]
            videos = gr.File(label="One or two videos", file_types=endings, file_count="multiple")
            measured = gr.Button("Measure the drift", variant="primary", elem_id="measure")
        with gr.Column(scale=9, min_width=340):
            report = gr.Markdown(elem_id="report")
            figure = gr.HTML(elem_id="figure")
            numbers = gr.DownloadButton("drift.json", visible=False)
    measured.click(app.measure, videos, [report, figure, numbers], concurrency_limit=None, api_name="measure")


def list_words(world: World | None) -> list[dict]:
    """The lists of words, as settings; those that a world does not need are hidden."""
    lists = [] if world is None else zip(world.words.items(), world.chosen)
    shown = [{"choices": list(words), "value": word, "label": label} for (label, words), word in lists]
    return [{**each, "visible": True} for each in shown] + [{"visible": False}] * (NUM_WORDS - len(shown))


def describe_world(name: str, limit: int) -> tuple:
    """The prompt, words, examples, next prompt and length of a world."""
    world = WORLDS[name]
    words = [gr.Dropdown(**settings) for settings in list_words(world)]
    examples = gr.Dataset(samples=[[each] for each in world.examples])
    return world.examples[0], *words, examples, world.examples[-1], min(world.chunks, limit)


def choose_words(name: str, *words: str) -> str:
    """The prompt of the chosen words."""
    world = WORLDS[name]
    return world.make_sentence(*words[: len(world.words)])


def set_buttons(is_running: bool) -> tuple:
    return gr.Button(interactive=not is_running), gr.Button(interactive=is_running)
