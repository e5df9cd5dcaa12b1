"""No public method leaves a gradient graph, although the models are trainable and gradients are on."""

import inspect
from pathlib import Path

import pytest
import torch
from builders import embeds, full_pipeline, noise, randn

from tokentrim import ContextPolicy, TokenTrimPipeline
from tokentrim.tokentrim_session.run import Rollout
from tokentrim.tokentrim_session.stream import Stream


PROMPT, OTHER = "a red circle moving right over a blue background", "a green square"
SIZE = {"num_frames": 21, "generator": None, "output_type": "latent"}
STREAM = {**SIZE, "output_type": "pt"}


def trainable_pipeline(**settings) -> TokenTrimPipeline:
    """All parameters require gradients, like those of a freshly loaded checkpoint."""
    pipe = full_pipeline(**settings)
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder):
        model.requires_grad_(True)
    return pipe


def tensors_of(value, seen=None):
    """All tensors inside a value, except those of models."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (torch.nn.Module, TokenTrimPipeline, type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from tensors_of(each, seen)
    elif inspect.isgenerator(value):
        yield from tensors_of(dict(inspect.getgeneratorlocals(value)), seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors_of(vars(value), seen)


def assert_no_graph(*values):
    tensors = list(tensors_of(values))
    assert tensors
    assert not [tensor for tensor in tensors if tensor.requires_grad or tensor.grad_fn is not None]


def begun(pipe, **arguments):
    return pipe.begin(pipe.plan(PROMPT, **{**SIZE, **arguments}))


def streamed(pipe, **arguments):
    return pipe.stream(PROMPT, **{**STREAM, **arguments})


def resumed(pipe, folder):
    with streamed(pipe, state_dir=folder) as stream:
        next(stream)
        stream.save_state()
    return pipe.resume(folder)


def changed(run):
    run.change_prompt(OTHER, "keep", 0)
    return run


def run_set_prompt(run):
    run.set_prompt(run.denoiser.prompt)
    return run


def loaded(run):
    run.load_state_dict(run.state_dict())
    return run


def stream_set_prompt(stream):
    stream.set_prompt(OTHER, blend_chunks=1)
    return [stream.run, next(stream)]


def went_back(stream):
    next(stream)
    stream.back(1, generator=torch.Generator().manual_seed(1))
    return [next(stream), stream]


def reseeded(run):
    run.change_generator(torch.Generator().manual_seed(1))
    return run


def closed(stream):
    stream.close()
    return [randn(1)]


def nothing(_):
    """For a method that neither takes nor returns tensors."""
    return [randn(1)]


# A way to call each public method; what it returns holds all tensors that the method made.
def empty_chunk(run: Rollout) -> torch.Tensor:
    num_videos, channels, *size = run.sizes.frame_shape
    return torch.zeros(num_videos, channels, run.sizes.chunk_size(0), *size)


WAYS = {
    TokenTrimPipeline: {
        "__call__": lambda pipe, _: pipe(PROMPT, **SIZE),
        "stream": lambda pipe, _: streamed(pipe),
        "resume": resumed,
        "plan": lambda pipe, _: pipe.plan(None, prompt_embeds=embeds().requires_grad_(), **SIZE),
        "roll_out": lambda pipe, _: list(pipe.roll_out(begun(pipe))),
        "begin": lambda pipe, _: begun(pipe, prompt_schedule={1: OTHER}, image=randn(3, 32, 48).sigmoid()),
        "fps": lambda pipe, _: nothing(pipe.fps),
        "decode_latents": lambda pipe, _: pipe.decode_latents(noise(2).requires_grad_(), "pt"),
    },
    Stream: {
        "__iter__": lambda stream, _: list(stream),
        "__next__": lambda stream, _: [next(stream), stream],
        "__enter__": lambda stream, _: stream.__enter__(),
        "__exit__": lambda stream, _: closed(stream),
        "close": lambda stream, _: closed(stream),
        "finish": lambda stream, _: nothing(stream.finish()),
        "index": lambda stream, _: nothing(stream.index),
        "set_prompt": lambda stream, _: stream_set_prompt(stream),
        "set_generator": lambda stream, _: [stream.set_generator(torch.Generator()), next(stream), stream],
        "back": lambda stream, _: went_back(stream),
        "save_state": lambda stream, folder: [stream.save_state(folder), stream],
        "save_video": lambda stream, folder: [
            stream.save_video(Path(folder) / "x.mp4", progress=False),
            stream,
            randn(1),
        ],
    },
    Rollout: {
        "remaining": lambda run, _: nothing(next(run.remaining())),
        "is_last": lambda run, _: nothing(run.is_last(0)),
        "evict": lambda run, _: [run.evict({0: [1]}), run],
        "advance": lambda run, _: [next(run.pipe.roll_out(run)), run],
        "num_steps_left": lambda run, _: nothing(run.num_steps_left()),
        "attached": lambda run, _: nothing(run.attached()),
        "progress_bar": lambda run, _: nothing(run.progress_bar()),
        "set_prompt": lambda run, _: run_set_prompt(run),
        "change_prompt": lambda run, _: changed(run),
        "change_generator": lambda run, _: reseeded(run),
        "schedule_change": lambda run, _: changed(run),
        "follow_schedule": lambda run, _: [changed(run).follow_schedule(0), run],
        "state_dict": lambda run, _: run.state_dict(),
        "load_state_dict": lambda run, _: loaded(run),
        "check_chunk": lambda run, _: nothing(run.check_chunk("a chunk", 0, empty_chunk(run))),
    },
}
MAKE = {TokenTrimPipeline: lambda pipe: pipe, Stream: lambda pipe: streamed(pipe, keep_states=1), Rollout: begun}
SPECIAL = ("__call__", "__iter__", "__next__", "__enter__", "__exit__")


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_every_public_method_is_tried(kind):
    """A new method needs a line above."""
    is_code = (property, *(type(each) for each in (lambda: None, staticmethod(print), classmethod(print))))
    public = {name for name, each in vars(kind).items() if not name.startswith("_") and isinstance(each, is_code)}
    assert public | (set(SPECIAL) & set(vars(kind))) == set(WAYS[kind])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, ways in WAYS.items() for name in ways])
def test_no_public_method_leaves_a_graph(kind, name, tmp_path):
    with torch.enable_grad():
        subject = MAKE[kind](trainable_pipeline())
        values = WAYS[kind][name](subject, tmp_path)
    assert_no_graph(values)


@pytest.mark.parametrize(
    "inputs",
    [
        {"image": randn(3, 32, 48).sigmoid().requires_grad_()},
        {"video": randn(1, 9, 3, 32, 48).sigmoid().requires_grad_()},
        {"video_latents": noise(1).transpose(1, 2).requires_grad_()},
        {"latents": noise(3).requires_grad_(), "num_frames": None},
        {"prompt": None, "prompt_embeds": embeds().requires_grad_()},
        {"prompt_schedule": {1: embeds().requires_grad_()}, "blend_chunks": 1},
        {"prompt": None, "prompt_schedule": {0: embeds().requires_grad_()}},
    ],
    ids=lambda inputs: " ".join(inputs),
)
def test_graphs_of_what_is_given_are_left_behind(inputs):
    """For example of embeddings made with gradients on: a run that kept them would keep the text encoder's graph."""
    pipe = trainable_pipeline()
    with pipe.stream(**{"prompt": PROMPT, **STREAM, "num_frames": 33, "height": 32, "width": 48, **inputs}) as stream:
        assert_no_graph(stream, stream.run)
        assert_no_graph(stream, list(stream))


class WithGradients(ContextPolicy):
    """Computes what it commits from a parameter."""

    def commit(self, chunk):
        with torch.enable_grad():
            return chunk * torch.ones(1, requires_grad=True)


class Hook:
    """Computes what it changes from a parameter."""

    def guides(self, generated_chunk, step, num_steps):
        return True

    def __call__(self, latents, predict_x0, transformer):
        with torch.enable_grad():
            return latents * torch.ones(1, requires_grad=True)


def with_gradients(pipe, step, timestep, tensors):
    with torch.enable_grad():
        return {name: tensor * torch.ones(1, requires_grad=True) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": [WithGradients(), "reanchor"]},
        {"method": [Hook(), "tokentrim_plus"]},
        {"method": "paper"},
        {
            "callback_on_step_end": with_gradients,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
            "rollout": "rolling_forcing",
        },
    ],
    ids=["policy", "hook", "FlowMo", "callback"],
)
def test_graphs_of_methods_and_callbacks_are_left_behind(settings):
    pipe, held = trainable_pipeline(), []
    with pipe.stream(PROMPT, **STREAM, **settings) as stream:
        for chunk in stream:
            held += tensors_of([chunk, stream.run])
    assert_no_graph(held)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 2.0, "negative_prompt": OTHER},
        {"prompt_schedule": {1: OTHER}, "prompt_transition": "recache"},
        {"image": randn(3, 32, 48).sigmoid()},
        {"rollout": "rolling_forcing", "prompt_schedule": {1: OTHER}, "blend_chunks": 1},
    ],
    ids=lambda arguments: " ".join(arguments) or "a prompt",
)
def test_a_stream_of_text_prompts_is_the_call_bit_by_bit(arguments):
    pipe = trainable_pipeline()
    arguments = {**arguments, "output_type": "latent", "num_frames": 33}
    whole = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **arguments)
    with pipe.stream(PROMPT, generator=torch.Generator().manual_seed(0), **arguments) as stream:
        assert torch.equal(torch.cat([chunk.latents for chunk in stream], dim=2), whole.frames)
