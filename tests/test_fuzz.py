"""Random calls. Each works and reports consistently, or raises with the name of an argument, and leaves the pipeline
as new.

`make fuzz EXAMPLES=20000` runs that many; a fifth of them are streams.
"""

import inspect
import json
import os
import re
import tempfile
import threading
from functools import cache

import numpy as np
import PIL.Image
import torch
from builders import full_pipeline, processors, quiet, randn, tiny_far, tiny_text_encoder, tiny_tokenizer, tiny_vae
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_policies.registry import HOOKS, POLICIES
from tokentrim.tokentrim_session.partition import count_latent_frames
from tokentrim.tokentrim_views.registry import LAYOUTS


EXAMPLES = int(os.environ.get("EXAMPLES", 0))
NUM_STREAMS = EXAMPLES // 5 or 60  # among the calls; each runs up to five times
NUM_CALLS = EXAMPLES - EXAMPLES // 5 or 200
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
PIPELINES = {
    "euler": lambda: full_pipeline(FlowMatchEulerDiscreteScheduler(shift=5.0)),
    "lcm": lambda: full_pipeline(FlowMatchLCMScheduler(shift=5.0), window_size=9, num_sink_frames=3),
    "flow_map": lambda: full_pipeline(FlowMapEulerDiscreteScheduler(shift=5.0), rollout="rolling_forcing"),
    "unipc": lambda: full_pipeline(UniPCMultistepScheduler(**FLOW)),
    "far": lambda: far(),
}
CALL = {"prompt": "a red circle", "num_frames": 21, "num_inference_steps": 2, "output_type": "latent"}
ARGUMENTS = set(inspect.signature(TokenTrimPipeline.__call__).parameters)
SETTINGS = {
    setting
    for kind in (*POLICIES.values(), *HOOKS.values(), *LAYOUTS.values())
    for setting in inspect.signature(kind).parameters
}
KNOWN = ARGUMENTS | SETTINGS | {"tokenizer", "text_encoder", "transformer", "vae", "scheduler", "flowmo"}


def far():
    parts = (tiny_tokenizer(), tiny_text_encoder(), tiny_far(), tiny_vae(), FlowMapEulerDiscreteScheduler(shift=5.0))
    return quiet(TokenTrimPipeline(*parts, height=64, width=96, max_sequence_length=8))


class Fuzzed:
    """A pipeline that is used many times, and its output for a call that never changes."""

    def __init__(self, name):
        self.pipe = PIPELINES[name]()
        self.before = self.fingerprint()
        self.reference = self.refer()
        self.count = 0

    def refer(self):
        generator = torch.Generator().manual_seed(5)
        return self.pipe(**CALL, generator=generator, method={"tokentrim": {"drift_sensitivity": 0.0}}).frames

    def fingerprint(self):
        transformer = self.pipe.transformer
        return (
            processors(transformer),
            id(transformer.condition_embedder.timesteps_proj),
            transformer.is_gradient_checkpointing,
            [parameter.requires_grad for parameter in transformer.parameters()],
        )

    def check(self):
        assert self.fingerprint() == self.before
        self.count += 1
        if self.count % 10 == 0:
            assert torch.equal(self.refer(), self.reference)


fuzzed = cache(Fuzzed)


# What is passed


def mostly(good, bad=()):
    """A good value, or a bad one in one of eight cases."""
    good = good if isinstance(good, st.SearchStrategy) else st.sampled_from(good)
    return st.integers(0, 7).flatmap(lambda pick: st.sampled_from(bad) if bad and pick == 0 else good)


class Callback:
    """A user's callback that acts at its call number `at`."""

    def __init__(self, does, at):
        self.does, self.at, self.calls = does, at, 0

    def __repr__(self):
        return f"Callback({self.does!r}, {self.at})"

    def __call__(self, pipe, step, timestep, tensors):
        self.calls += 1
        if self.calls != self.at:
            return {}
        if self.does == "interrupt":
            pipe._interrupt = True
        elif self.does == "stop":
            raise KeyboardInterrupt
        elif self.does == "unguided":
            pipe._guidance_scale = 0.0
        elif self.does == "latents":
            return {"latents": tensors.get("latents", torch.zeros(1)) * 0.5}
        elif self.does == "in place":
            tensors.get("prompt_embeds", torch.zeros(1)).mul_(0.5)
        elif self.does == "none":
            return None
        elif self.does == "nested":
            pipe(**CALL)
        return {}


def told(index, latents, decisions):
    json.dumps(decisions, allow_nan=False)
    decisions.clear()
    latents.zero_()


def redrawn(chunk, step):
    return randn(1, 4, 3, 4, 6, seed=100 * chunk + step)


numbers = [0, -1, 1.5, "3", None, [], float("nan"), np.int64(2)]
tokentrim = st.fixed_dictionaries(
    {"drift_sensitivity": mostly([0.0, 0.1, 2.0], [-1, "x"])},
    optional={
        "prune_fraction": mostly([1e-9, 0.1, 0.5, np.float32(0.9)], [0, 1, "x"]),
        "warmup_chunks": mostly([0, 1, 2], numbers[1:4]),
        "max_regenerations": mostly([0, 1, 3], numbers[1:4]),
        "drift_signal": mostly(["final", "first_step"], ["last"]),
        "prune_weight": mostly([0.0, 0.5], [1.0, -1]),
    },
)
reanchor = st.fixed_dictionaries(
    {},
    optional={
        "match": mostly(["mean", "moments", "histogram", "distribution", "covariance", "near"], ["median"]),
        "tolerance": mostly([None, 0.5, 2.0], [0, "x"]),
        "patience": mostly([1, 2, 6], numbers[:4]),
        "strength": mostly([0.0, 0.5, 1.0], [2.0, "x"]),
    },
)
quarantine = st.fixed_dictionaries({"sensitivity": mostly([0.0, 6.0], [-1.0, None])})
flowmo = st.fixed_dictionaries(
    {}, optional={"iterations": mostly([0, 1], [-1]), "chunks": mostly(["first", "all"], ["last"])}
)
methods = st.one_of(
    mostly(
        ["plain", "tokentrim", "paper", "tokentrim_plus", "reanchor", "quarantine"],
        ["best", 3, {}, [], {"best": {}}, object()],
    ),
    tokentrim.map(lambda own: {"tokentrim": own}),
    st.tuples(quarantine, reanchor).map(lambda own: {"quarantine": own[0], "reanchor": own[1]}),
    st.tuples(flowmo, tokentrim).map(lambda own: {"flowmo": own[0], "tokentrim": own[1]}),
    st.tuples(tokentrim, reanchor).map(
        lambda own: [{"tokentrim": own[0]}, {"reanchor": own[1]}, TokenTrimPipeline.ContextPolicy()]
    ),
)
layouts = st.one_of(
    mostly(sorted(LAYOUTS), ["door", 3, [], {"window": {}, "tether": {}}, {"window": 3}, object()]),
    st.tuples(
        st.sampled_from(sorted(LAYOUTS)),
        st.fixed_dictionaries(
            {},
            optional={
                "window_size": mostly([3, 6, 9, 12, 21], numbers),
                "num_sink_frames": mostly([0, 1, 3], numbers),
            },
        ),
    ).map(lambda own: {own[0]: own[1]}),
)
generators = st.builds(lambda seed: torch.Generator().manual_seed(seed), st.integers(0, 9))
tensors = st.builds(
    lambda shape, seed: randn(*shape, seed=seed),
    st.sampled_from([(1, 4, 6, 4, 6), (2, 4, 6, 4, 6), (1, 4, 9, 4, 6), (1, 4, 3, 8, 12), (4, 6, 4, 6)]),
    st.integers(0, 3),
)
VALUES = {
    "prompt": mostly(["a red circle", ["a red circle"], ["blue", "green square"]], ["", " ", ["a", ""], None, 3, [], ["a", 3], {}]),
    "negative_prompt": mostly([None, "blue", ["blue"]], [3, ["a", "b", "c"]]),
    "prompt_embeds": mostly([randn(1, 8, 32), randn(2, 8, 32), randn(1, 5, 32)], [randn(1, 8, 32) * float("nan"), randn(8, 32), "a"]),
    "negative_prompt_embeds": mostly([randn(1, 8, 32, seed=1), randn(1, 5, 32)], [randn(1, 8, 31), 3]),
    "num_frames": mostly(st.integers(1, 40), numbers[:-2]),
    "num_inference_steps": mostly([1, 2, 3, np.int64(2)], numbers[:4]),
    "height": mostly([32, 64], [0, 40, "32", 32.0]),
    "width": mostly([48, 96], [-16, 50]),
    "sigmas": mostly([[1.0, 0.5], np.linspace(1, 0, 4)[:-1], torch.tensor([1.0, 0.3]), [0.7]], [[], [0.5, 1.0], "x", [None], [float("nan")]]),
    "timesteps": mostly([[1000, 500], [900.0], np.array([999, 5])], [[], [1001], [5, 5], 3]),
    "guidance_scale": mostly([0.0, 1.0, 1, np.float32(2.0), 3.0], [-1, float("nan"), "3", None]),
    "num_videos_per_prompt": mostly([1, 2], numbers[:4]),
    "generator": st.one_of(generators, st.lists(generators, min_size=1, max_size=2), mostly([None], [0, [None]])),
    "latents": mostly(tensors, [randn(1, 4, 6, 4, 6) * float("inf"), "x", np.zeros((1, 4, 6, 4, 6))]),
    "output_type": mostly(["latent", "latent", "latent", "np", "pt", "pil"], ["mp4", None]),
    "return_dict": st.booleans(),
    "attention_kwargs": mostly([None, {}], [3]),
    "callback_on_step_end": mostly(
        st.builds(Callback, st.sampled_from(["", "interrupt", "stop", "unguided", "latents", "in place", "none", "nested"]), st.integers(1, 9)),
        ["print", 3],
    ),
    "callback_on_step_end_tensor_inputs": mostly([["latents"], ["latents", "prompt_embeds"], [], ["negative_prompt_embeds"]], [None, ["x"], [3]]),
    "max_sequence_length": mostly([8, 5], numbers[:4]),
    "use_mean_velocity": mostly([True, False], [1]),
    "use_kv_cache": mostly([True], [False]),
    "chunk_partition": mostly([[3, 3], [1, 2, 3], [6], np.array([2, 2, 2]), [1] * 6], [[], [0, 6], [7], 3, [1.5]]),
    "prompt_schedule": mostly(
        [None, {1: "green"}, {0: "red", 1: "blue", 3: "green"}, [{1: "green"}], {1: randn(1, 8, 32)}, {np.int64(1): "blue"}],
        [{}, {-1: "x"}, {2: 3}, {1: randn(1, 5, 32)}, 3, {1: ["a", "b", "c"]}],
    ),
    "prompt_transition": mostly(["keep", "recache", "flush", "cut", {1: "flush"}], ["jump", {7: "cut"}, 3]),
    "blend_chunks": mostly([0, 1], [-1, 99, "x"]),
    "method": methods,
    "prune_fraction": mostly([0.1, 0.5], [0, "x"]),
    "drift_sensitivity": mostly([0.0, 2.0], [-1]),
    "warmup_chunks": mostly([0, 1], [-1, 1.5]),
    "max_regenerations": mostly([0, 2], [-1]),
    "drift_signal": mostly(["final", "first_step"], ["x", 3]),
    "rollout": mostly(["self_forcing", "rolling_forcing"], ["x", 3]),
    "num_frames_per_chunk": mostly([1, 2, 3, 4], numbers[:4]),
    "layout": layouts,
    "window_size": mostly([3, 6, 9, 12, "all", np.int64(9)], [0, "x", 1.5]),
    "num_sink_frames": mostly([0, 1, 3], [-1, "x"]),
    "relative_positions": mostly([True, False], [1]),
    "sink_at_commit": mostly([True, False], [0]),
    "context_noise": mostly([0.0, 100, 250.5], [-1, 1001, "some", float("nan")]),
    "protect_conditioning": mostly([True, False], [None]),
    "pad_keys": mostly([True, False], [None]),
    "renoise": mostly([redrawn], [3, lambda chunk, step: None]),
    "on_chunk": mostly([told], ["x"]),
    "video": mostly(
        [randn(1, 1, 3, 32, 48).sigmoid(), randn(1, 5, 3, 32, 48).sigmoid(), np.zeros((1, 9, 32, 48, 3), np.uint8), list(np.zeros((5, 32, 48, 3)))],
        [randn(1, 5, 3, 32, 48), randn(1, 4, 3, 32, 48).sigmoid(), "a.mp4", [], [1], np.zeros((1, 9, 32, 32, 3))],
    ),
    "image": mostly(
        [PIL.Image.new("RGB", (48, 32)), np.zeros((32, 48, 3), np.float32), randn(3, 40, 50).sigmoid(), [PIL.Image.new("RGBA", (9, 9))]],
        [randn(3, 32, 48), "a.png", [], 3, np.zeros((32, 48, 3), np.uint8), torch.zeros(2)],
    ),
    "video_latents": mostly([randn(1, 1, 4, 4, 6), randn(1, 3, 4, 4, 6), randn(1, 4, 4, 4, 6)], [randn(1, 3, 4, 4, 4), 3, randn(1, 99, 4, 4, 6)]),
}  # fmt: skip
calls = st.lists(st.sampled_from(sorted(VALUES)), max_size=6, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] for name in names})
)
MODES = ["call"] * 6 + ["stream", "nan", "memory", "threads"]


# What must hold


def test_every_argument_is_fuzzed():
    assert set(VALUES) == ARGUMENTS - {"self"}


def is_refusal(error):
    """Whether the error names an argument, in one readable line."""
    told = re.findall(r"`(\w+)", str(error))
    assert set(told) & KNOWN or re.search(r"chunk \d+: ", str(error)), repr(error)
    assert len(str(error)) < 700 and "\n" not in str(error), repr(error)


def is_consistent(pipe, plan, output, interrupted):
    frames, decisions = output if isinstance(output, tuple) else (output.frames, output.decisions)
    sizes = plan.sizes
    assert len(decisions) == len(frames) == sizes.num_videos
    length = len(frames[0]) if plan.decodes else frames.shape[2]
    whole = sizes.num_frames if plan.decodes else count_latent_frames(sizes.num_frames, sizes.temporal_factor)
    assert length <= whole if interrupted else length == whole
    if not isinstance(output, tuple) and plan.decodes:
        assert sum(output.chunk_frames) == length
    for each in decisions:
        assert [decision["chunk"] for decision in each] == list(range(len(each)))
        assert interrupted or len(each) == len(sizes.chunk_partition)
        for decision in each:
            assert decision["trim"] == bool(decision["tokens"])
            assert decision["trim"] or decision["regenerated_severity"] is None
    json.dumps(decisions, allow_nan=False)


def run(pipe, call, mode):
    """The output of a call, through one of several entry points."""
    if mode == "stream":
        with pipe.stream(**{**call, "return_dict": True}) as stream:
            return [chunk for chunk, _ in zip(stream, range(3))]
    if mode == "threads":
        others = []

        def other():
            try:
                pipe(**CALL)
            except RuntimeError as error:
                others.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        try:
            return pipe(**call)
        finally:
            thread.join()
            assert all("in a rollout already" in str(error) for error in others)
    return pipe(**call)


def sabotage(pipe, mode):
    """A hook that makes a model fail in one of its forwards."""
    forwards = []

    def spoil(module, arguments, output):
        forwards.append(1)
        return (output[0] * float("nan"),) if len(forwards) > 2 and output[0] is not None else None

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    return (
        pipe.transformer.register_forward_hook(spoil)
        if mode == "nan"
        else pipe.vae.decoder.register_forward_pre_hook(fail)
    )


@settings(
    max_examples=NUM_CALLS,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.sampled_from(sorted(PIPELINES)), calls, st.sampled_from(MODES))
def test_call_works_or_names_the_wrong_argument(name, given_arguments, mode):
    this = fuzzed(name)
    pipe, call = this.pipe, {**CALL, **given_arguments}
    if call["num_frames"] is None and mode != "stream":
        call["num_frames"] = 21
    if mode == "memory" and "output_type" not in given_arguments:
        call["output_type"] = "np"  # so that something is decoded
    if "prompt_embeds" in call and call.get("prompt") == CALL["prompt"]:
        call["prompt"] = None
    callback = call.get("callback_on_step_end")
    handle = sabotage(pipe, mode) if mode in ("nan", "memory") else None
    try:
        plan = None if mode == "stream" else pipe.plan(**call)
        output = run(pipe, call, mode)
        if mode == "stream":
            for chunk in output:
                json.dumps(chunk.decisions, allow_nan=False)
        else:
            is_consistent(
                pipe, plan, output, isinstance(callback, Callback) and callback.does in ("interrupt", "nested")
            )
        event(f"{mode}: works")
    except (TypeError, ValueError) as error:
        is_refusal(error)
        event("refused by name")
    except KeyboardInterrupt:
        event("KeyboardInterrupt in a callback")
        assert callback.does == "stop"
    except torch.OutOfMemoryError as error:
        event("out of memory in the VAE")
        assert mode == "memory" and (
            error.latents.shape[2] > 0 if hasattr(error, "latents") else {"video", "image"} & set(call)
        )
    except RuntimeError as error:
        event("not finite" if "not finite" in str(error) else "in a rollout already")
        expected = {"nan": "not finite", "threads": "in a rollout already"}.get(mode, "in a rollout already")
        nested = isinstance(callback, Callback) and callback.does == "nested" and "in a rollout already" in str(error)
        assert nested or (mode in ("nan", "threads") and expected in str(error)), repr(error)
    finally:
        if handle is not None:
            handle.remove()
    this.check()


# Streams


texts = st.sampled_from(["a red circle", "a green square", "blue", "circle moving left"])
changes = st.one_of(texts, st.just(randn(1, 8, 32, seed=2)))
schedules = st.one_of(
    st.none(),
    st.dictionaries(st.integers(1, 3), changes, min_size=1, max_size=2).map(lambda own: dict(sorted(own.items()))),
    st.lists(st.one_of(st.none(), st.just({}), st.fixed_dictionaries({1: texts}), st.fixed_dictionaries({2: texts})), min_size=1, max_size=2),
)  # fmt: skip
given_frames = st.one_of(
    st.just({}),
    st.sampled_from([9, 40, 60]).map(lambda width: {"image": PIL.Image.new("RGB", (width, 32), "red")}),
    st.just({"image": np.full((20, 30, 3), 99, np.uint8)}),
    st.sampled_from([1, 9]).map(lambda number: {"video": randn(1, number, 3, 32, 48).sigmoid()}),
)
stream_calls = st.fixed_dictionaries(
    {
        "prompt": st.one_of(texts, st.lists(texts, min_size=1, max_size=2)),
        "num_frames": st.sampled_from([9, 21, 33, 40]),
        "prompt_schedule": schedules,
        "method": st.sampled_from(["plain", "tokentrim", "tokentrim_plus", {"quarantine": {"sensitivity": 0.0}, "reanchor": {"patience": 1}}]),
        "num_videos_per_prompt": st.sampled_from([1, 1, 2]),
        "seed": st.integers(0, 9),
    },
    optional={
        "prompt_transition": st.sampled_from(["keep", "recache", "flush", "cut"]),
        "blend_chunks": st.sampled_from([0, 1]),
        "guidance_scale": st.sampled_from([1.0, 2.0]),
        "window_size": st.sampled_from([9, 12, "all"]),
        "layout": st.sampled_from(["infinity_rope", "longlive", "memrope", "tame"]),
        "output_type": st.sampled_from(["latent", "pt"]),
        "max_sequence_length": st.sampled_from([8, 6]),
    },
)  # fmt: skip
steers = st.dictionaries(
    st.integers(0, 3),
    st.tuples(
        st.one_of(changes, st.lists(st.one_of(st.none(), texts), min_size=1, max_size=2), st.just(3)),
        st.sampled_from([None, "keep", "recache", "flush", "cut", "jump"]),
        st.sampled_from([0, 0, 1, -1]),
    ),
    max_size=2,
)


def steered(stream, steers, num_chunks=None):
    """The next chunks of a stream, whose prompt is set where `steers` says so; refusals change nothing."""
    chunks = []
    while len(chunks) != num_chunks:
        if (change := steers.get(stream.index)) is not None:
            try:
                stream.set_prompt(*change)
            except (TypeError, ValueError) as error:
                is_refusal(error)
        chunk = next(stream, None)
        if chunk is None:
            break
        assert not chunk.latents.requires_grad
        chunks.append(chunk)
    return chunks


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert torch.equal(one.latents, other.latents) and one.decisions == other.decisions
        assert one.frames is None or torch.equal(one.frames, other.frames)


@settings(
    max_examples=NUM_STREAMS,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.sampled_from(sorted(PIPELINES)), stream_calls, given_frames, steers, st.integers(0, 3))
def test_a_stream_is_its_call_and_goes_on_after_a_cut_or_says_which_argument_is_wrong(name, call, given, steers, cut):
    """A text encoder that asks for gradients changes no bit."""
    this = fuzzed(name)
    pipe, call = this.pipe, {"num_inference_steps": 2, "output_type": "latent", **call, **given}
    pipe.text_encoder.requires_grad_(True)
    seed = call.pop("seed")

    def stream(**settings):
        return pipe.stream(**call, generator=torch.Generator().manual_seed(seed), **settings)

    try:
        with stream() as unsteered:
            chunks = list(unsteered)
        if not ("prompt_transition" in call and call["prompt_schedule"] is None):  # a stream takes it for `set_prompt`
            output = pipe(**call, generator=torch.Generator().manual_seed(seed))
            parts = [chunk.latents if call["output_type"] == "latent" else chunk.frames for chunk in chunks]
            assert torch.equal(torch.cat(parts, dim=2 if call["output_type"] == "latent" else 1), output.frames)
        expected = chunks
        if steers:
            with stream() as whole:
                expected = steered(whole, steers)
        with tempfile.TemporaryDirectory() as folder:
            with stream(state_dir=folder) as ours:
                first = steered(ours, steers, cut)
                if ours.run is not None:  # else the last state is that of the end
                    ours.save_state()
            with pipe.resume(folder, **{name: call[name] for name in ("image",) if name in call}) as ours:
                same([*first, *steered(ours, steers)], expected)
        event("works")
    except (TypeError, ValueError) as error:
        is_refusal(error)
        event("refused by name")
    this.check()
