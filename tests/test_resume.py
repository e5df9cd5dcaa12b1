# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A run that is cut in any way resumes to the same bits."""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback

import imageio.v3 as imageio
import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    HEIGHT,
    TEXT_LENGTH,
    WIDTH,
    far_components,
    full_pipeline,
    quiet,
    randn,
    tiny_transformer,
    tiny_vae,
)
from conftest import ROOT
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

import tokentrim
from tokentrim import TokenTrimPipeline, tokentrim_writing
from tokentrim.tokentrim_files import run_state
from tokentrim.tokentrim_files.run_state import STATE, TENSORS, load_state, save_state


PROMPT = "a red circle moving right over a blue background"
EAGER = {"drift_sensitivity": 0.0, "warmup_chunks": 1, "prune_fraction": 0.4}


def settings(num_chunks=6, seeds=(0,), **others):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    generator = generators[0] if len(generators) == 1 else generators
    return {"num_frames": 4 * CHUNK * num_chunks - 3, "window_size": 9, "generator": generator, **others}


# Killed


NUM_CHUNKS = 16


def killed_pipeline():
    return full_pipeline(FlowMatchLCMScheduler(shift=5.0))


def killed_call():
    """Two videos with trims, quarantine, re-anchoring and prompt changes: everything that a state holds."""
    return {
        "prompt": [PROMPT, "a green square"],
        "method": ["tokentrim", "tokentrim_plus"],
        "prompt_schedule": {5: "a blue circle", 11: "a red square"},
        "prompt_transition": {5: "recache", 11: "flush"},
        "blend_chunks": 2,
        **EAGER,
        **settings(NUM_CHUNKS, seeds=(1, 2), window_size=15),
    }


def make_video(folder, save_every=2):
    """In a child: start or resume, and report."""
    pipe, run = killed_pipeline(), folder / "run"

    def on_chunk(index, latents, decisions):
        path = folder / f"{index}.pt"
        if path.exists() and not torch.equal(torch.load(path), latents):
            raise AssertionError(f"chunk {index} is another one than before the kill")
        torch.save(latents, folder / "latents.unfinished")
        os.replace(folder / "latents.unfinished", path)
        print("chunk", index, flush=True)

    if run_state.has_state(run):
        stream = pipe.resume(run, on_chunk=on_chunk)
    else:
        stream = pipe.stream(state_dir=run, save_every=save_every, on_chunk=on_chunk, **killed_call())
    print("begins", stream.index, flush=True)
    stream.save_video(folder / "x.mp4", 8, progress=False)
    print("done", flush=True)


def slow_states():
    """In a child: writing a state takes long, and is reported."""
    sync = tokentrim_writing.sync

    def slow_sync(path):
        print("writing", path.name, flush=True)
        time.sleep(0.05)
        sync(path)

    tokentrim_writing.sync = slow_sync


class Child:
    """A process forked from this one, which has all imports, and its stdout, line by line."""

    def __init__(self, *calls):
        reading, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(reading)
                sys.stdout = os.fdopen(writing, "w")
                for call, *arguments in calls:
                    call(*arguments)
                code = 0
            except BaseException as error:
                print("failed", type(error).__name__, error, traceback.format_exc())
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(writing)
        self.lines = os.fdopen(reading)
        self.code = None

    def wait_for(self, word, times=1):
        while times:
            line = self.lines.readline()
            assert line and not line.startswith("failed"), line + self.lines.read()
            times -= line.startswith(word)
        return line

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        return self.end()[0] == -signal.SIGKILL

    def end(self):
        said = self.lines.read()
        self.lines.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("x*"))}


def count(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_playable(folder, num_videos=2):
    """Every frame of every chunk that has a decision can be read."""
    for video in range(num_videos):
        path = folder / (f"x-{video}.mp4" if num_videos > 1 else "x.mp4")
        if lines := count(path.with_suffix(".jsonl")):
            assert len(imageio.imread(path)) >= 4 * CHUNK * lines - 3


def tensors_of(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield from tensors_of(each, f"{name}/{key}")


@pytest.mark.slow
def test_run_killed_at_random_moments_resumes_to_the_same_bits(tmp_path):
    """At least ten kills in one rollout, three of them and at least one while a state is written."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    code, said = Child((make_video, whole)).end()
    assert code == 0 and "done" in said, said

    rng, log, torn = random.Random(0), [], 0
    while len(log) < 10 or torn == 0:
        assert len(log) < 30, log
        child = Child((slow_states,), (make_video, cut))
        begins = int(child.wait_for("begins").split()[1])
        if len(log) % 3 == 1:
            child.wait_for("writing", rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.05))
        else:
            child.wait_for("chunk", rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.3))
        assert child.kill(), "the video was over too early"
        half = [path.name for path in (cut / "run").glob(".*.unfinished")]
        torn += bool(half)
        check_playable(cut)
        log.append((len(log) + 1, begins, count(cut / "x-0.jsonl"), *half))
    print("kill, from chunk, decisions in the file, half a state:", *log, sep="\n")
    code, said = Child((make_video, cut)).end()
    assert code == 0 and "done" in said, said

    assert files(cut) == files(whole)  # videos and decisions, byte for byte
    expected = killed_pipeline()(**{**killed_call(), "output_type": "latent"})
    latents = torch.cat([torch.load(cut / f"{index}.pt") for index in range(NUM_CHUNKS)], dim=2)
    torch.testing.assert_close(latents, expected.frames, atol=0, rtol=0)
    for video, decisions in enumerate(expected.decisions):
        lines = (cut / f"x-{video}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == decisions
        assert len(imageio.imread(cut / f"x-{video}.mp4")) == 4 * CHUNK * NUM_CHUNKS - 3
    assert any(each["trim"] for decisions in expected.decisions for each in decisions)
    for folder in (whole, cut):  # the last state stands behind the last chunk, and nothing else is left
        assert [path.name for path in (folder / "run").iterdir()] == [f"state-{NUM_CHUNKS:08}"]
    ours, theirs = (dict(tensors_of(load_state(folder / "run")["run"])) for folder in (cut, whole))
    assert len(ours) > 20 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# A full disk


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["state", "video"])
def test_full_disk_raises_and_keeps_the_last_state_and_video(what, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    save_every = 2 if what == "state" else 100
    assert Child((make_video, whole, save_every)).end()[0] == 0
    largest = max((whole / "run").rglob(TENSORS), key=os.path.getsize) if what == "state" else whole / "x-0.mp4"
    code, said = Child((limit_files, int(0.6 * largest.stat().st_size)), (make_video, cut, save_every)).end()
    assert code == 1 and "failed OSError" in said, said
    assert ("The state could not be written" if what == "state" else "The next chunk") in said
    check_playable(cut)
    assert [path.name for path in (cut / "run").iterdir()] == [max(path.name for path in (cut / "run").iterdir())]
    code, said = Child((make_video, cut)).end()  # with room again
    assert code == 0, said
    assert files(cut) == files(whole)


# Cut between two chunks, and resumed by another pipeline


def rolling_call(**others):
    return settings(6, rollout="rolling_forcing", num_inference_steps=3, window_size=15, **others)


def per_video():
    return [{2: "a blue circle"}, {1: "a red square", 4: "a green circle"}]


def far_pipeline():
    return quiet(TokenTrimPipeline(**far_components()))


def far_call(**others):
    arguments = {"height": 64, "width": 96, "max_sequence_length": TEXT_LENGTH, "num_inference_steps": 2}
    return {"num_frames": 37, "generator": torch.Generator().manual_seed(0), **arguments, **EAGER, **others}


def schedulers(scheduler, **others):
    return lambda: full_pipeline(scheduler(shift=5.0, **others))


def unipc():
    return full_pipeline(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))


BATCH = {"prompt": [PROMPT, "a green square"]}
SCHEDULE = {"prompt_schedule": {1: "a blue circle", 4: "a green square"}}
plus = {"method": "tokentrim_plus"}
lcm = schedulers(FlowMatchLCMScheduler)
stochastic = schedulers(FlowMatchEulerDiscreteScheduler, stochastic_sampling=True)
CASES = {
    "self_forcing": (full_pipeline, lambda: settings(**EAGER)),
    "frames": (full_pipeline, lambda: settings(output_type="np", **EAGER)),
    "rolling_forcing": (full_pipeline, lambda: rolling_call(**EAGER)),
    "rolling_forcing, LCM": (lcm, lambda: rolling_call(**EAGER)),
    "batch": (full_pipeline, lambda: settings(seeds=(1, 2), **EAGER, **BATCH)),
    "batch, one generator": (lcm, lambda: settings(**EAGER, **BATCH)),
    "videos of a prompt": (full_pipeline, lambda: settings(num_videos_per_prompt=2, **EAGER)),
    "guidance": (full_pipeline, lambda: settings(guidance_scale=3.0, negative_prompt="a square", **EAGER)),
    "UniPC": (unipc, lambda: settings(**EAGER)),
    "LCM": (lcm, lambda: settings(**EAGER)),
    "stochastic": (stochastic, lambda: settings(**EAGER)),
    "first step": (lcm, lambda: settings(drift_signal="first_step", **EAGER)),
    "plus": (full_pipeline, lambda: settings(12, **plus)),
    "plus, batch": (full_pipeline, lambda: settings(12, seeds=(1, 2), **BATCH, **plus)),
    "paper": (full_pipeline, lambda: settings(method="paper")),
    "FAR": (far_pipeline, far_call),
    "FAR, keep, batch": (far_pipeline, lambda: far_call(method="plain", **SCHEDULE, **BATCH) | dict.fromkeys(EAGER)),
    "continued": (full_pipeline, lambda: settings(video_latents=randn(1, 2 * CHUNK, CHANNELS, 4, 6), **EAGER)),
    "given noise": (full_pipeline, lambda: settings(latents=randn(1, CHANNELS, 6 * CHUNK, HEIGHT, WIDTH), **EAGER)),
    "keep": (full_pipeline, lambda: settings(prompt_transition="keep", **SCHEDULE, **EAGER)),
    "recache": (full_pipeline, lambda: settings(prompt_transition="recache", **SCHEDULE, **EAGER)),
    "flush": (full_pipeline, lambda: settings(prompt_transition="flush", **SCHEDULE, **EAGER)),
    "cut": (full_pipeline, lambda: settings(prompt_transition="cut", **SCHEDULE, **EAGER)),
    "blend": (full_pipeline, lambda: settings(blend_chunks=2, **SCHEDULE, **EAGER)),
    "blend, recache": (lcm, lambda: settings(blend_chunks=2, prompt_transition="recache", **SCHEDULE, **EAGER)),
    "per video": (full_pipeline, lambda: settings(seeds=(1, 2), prompt_schedule=per_video(), **EAGER, **BATCH)),
    "endless": (full_pipeline, lambda: settings(**EAGER) | {"num_frames": None}),
}


def assert_same(chunks, expected):
    assert [chunk.index for chunk in chunks] == [chunk.index for chunk in expected]
    for chunk, other in zip(chunks, expected):
        torch.testing.assert_close(chunk.latents, other.latents, atol=0, rtol=0)
        assert chunk.decisions == other.decisions
        assert chunk.frames is None or (chunk.frames == other.frames).all()


@pytest.mark.parametrize("name", CASES)
def test_cut_run_resumes_to_the_same_bits(name, tmp_path):
    make, call = CASES[name]

    def stream(pipe, **others):
        arguments = {"prompt": PROMPT, "output_type": "latent", **call(), **others}
        if arguments.get("generator") is not None and arguments.get("num_frames") is None:
            return iter_of(pipe.stream(**arguments), 6)
        return pipe.stream(**arguments)

    expected = list(stream(make()))
    assert len(expected) >= 5
    for cut in (0, 1, 2, 4) if name in ("self_forcing", "rolling_forcing") else (len(expected) // 2 + 1,):
        folder = tmp_path / str(cut)
        with make().stream(**{"prompt": PROMPT, "output_type": "latent", **call()}) as begun:
            chunks = [next(begun) for _ in range(cut)]
            begun.save_state(folder)
        torch.manual_seed(99)  # whatever else the other process draws
        resumed = make().resume(folder)
        assert resumed.index == cut
        rest = iter_of(resumed, len(expected) - cut)
        assert_same([*chunks, *rest], expected)


def iter_of(stream, num_chunks):
    """The first chunks, whether or not more follow."""
    with stream:
        for _ in range(num_chunks):
            yield next(stream)


def test_run_can_be_cut_repeatedly(tmp_path):
    expected = list(full_pipeline().stream(PROMPT, output_type="latent", **settings(**EAGER)))
    stream, chunks = full_pipeline().stream(PROMPT, output_type="latent", state_dir=tmp_path, **settings(**EAGER)), []
    while True:
        chunks += [chunk for _, chunk in zip(range(1), stream)]
        stream.save_state()
        if stream.index == 6:
            break
        stream = full_pipeline().resume(tmp_path)
    assert_same(chunks, expected)


def test_prompt_set_during_a_run_is_saved(tmp_path):
    def run(cut):
        chunks, stream = [], full_pipeline().stream(PROMPT, output_type="latent", **settings(**EAGER))
        for index in range(6):
            if index == 2:
                stream.set_prompt("a blue circle", "recache", blend_chunks=2)
            if index == cut:
                stream.save_state(tmp_path / str(cut))
                stream.close()
                stream = full_pipeline().resume(tmp_path / str(cut))
            chunks.append(next(stream))
        return chunks

    expected = run(None)
    for cut in (2, 3, 4):
        assert_same(run(cut), expected)


def test_random_numbers_without_a_generator_resume(tmp_path):
    pipe, call = full_pipeline(), settings(**EAGER) | {"generator": None, "output_type": "latent"}
    torch.manual_seed(3)
    expected = list(pipe.stream(PROMPT, **call))
    torch.manual_seed(3)
    with pipe.stream(PROMPT, **call) as stream:
        chunks = [next(stream), next(stream)]
        stream.save_state(tmp_path)
    torch.manual_seed(4)
    assert_same([*chunks, *full_pipeline().resume(tmp_path)], expected)


class Halves(TokenTrimPipeline.ContextPolicy):
    """A custom policy whose state is saved with the run."""

    def __init__(self):
        self.seen, self.mean = [], None

    def commit(self, chunk):
        self.seen.append(round(float(chunk.mean()), 6))
        self.mean = chunk if self.mean is None else (self.mean + chunk) / 2
        return self.mean

    def close(self, entered):
        return {"seen": list(self.seen)}


class Newest(TokenTrimPipeline.Layout):
    def keep(self, held, new):
        return held[-CHUNK:]


def test_custom_objects_are_passed_again(tmp_path):
    calls = []

    def objects():
        return {
            "method": [Halves()],
            "layout": Newest(),
            "renoise": lambda chunk, step: randn(1, CHANNELS, CHUNK, HEIGHT, WIDTH, seed=10 * chunk + step),
            "on_chunk": lambda index, latents, decisions: calls.append(index),
        }

    call = {**settings(), "window_size": None, "output_type": "latent"}
    expected = list(lcm().stream(PROMPT, **call, **objects()))
    call = {**settings(), "window_size": None, "output_type": "latent"}
    with lcm().stream(PROMPT, **call, **objects()) as stream:
        chunks = [next(stream), next(stream)]
        stream.save_state(tmp_path)
    for missing in objects():
        others = {name: each for name, each in objects().items() if name != missing}
        with pytest.raises(ValueError, match=f"`{missing}` must be given again"):
            lcm().resume(tmp_path, **others)
    calls.clear()
    assert_same([*chunks, *lcm().resume(tmp_path, **objects())], expected)
    assert calls == [2, 3, 4, 5]


# States


@pytest.fixture
def run(tmp_path):
    """A folder with the state after chunk 2, and the chunks of the whole run."""
    arguments = {"output_type": "np", **settings(4, **EAGER)}
    expected = list(full_pipeline().stream(PROMPT, **arguments))
    with full_pipeline().stream(PROMPT, **{**arguments, **settings(4, **EAGER)}) as stream:
        next(stream)
        next(stream)
        stream.save_state(tmp_path / "run")
    return tmp_path / "run", expected


def test_states_are_saved_every_few_chunks_and_only_the_last_is_kept(tmp_path):
    saved = []
    stream = full_pipeline().stream(PROMPT, state_dir=tmp_path, save_every=2, output_type="latent", **settings(5))
    for _ in stream:
        saved.append([path.name for path in tmp_path.iterdir()])
    assert saved == [[f"state-{number:08}"] for number in (0, 0, 2, 2, 4)]
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000005"]
    resumed = full_pipeline().resume(tmp_path)
    assert resumed.index == 5 and list(resumed) == []


def test_newest_whole_state_is_loaded_or_that_of_a_number(tmp_path):
    for number in (1, 2, 3):
        save_state(tmp_path / str(number), number, {"value": number})
        shutil.move(next((tmp_path / str(number)).iterdir()), tmp_path)
    assert load_state(tmp_path) == {"value": 3}
    assert [load_state(tmp_path, number) for number in (1, 2)] == [{"value": 1}, {"value": 2}]


def test_old_state_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    save_state(tmp_path, 3, {"value": 1})
    with monkeypatch.context() as patch:
        patch.setattr(tokentrim_writing, "sync", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_state(tmp_path, 3, {"value": 2})
    assert load_state(tmp_path) == {"value": 1}
    for value in (2, 3):
        save_state(tmp_path, 3, {"value": value})
        assert load_state(tmp_path) == {"value": value} and len(list(tmp_path.iterdir())) == 1


def test_remains_of_a_killed_save_are_removed(tmp_path):
    for sweep in (lambda: save_state(tmp_path, 3, {}), lambda: run_state.remove_states(tmp_path)):
        (tmp_path / ".state-00000002.unfinished").mkdir()
        sweep()
        assert not list(tmp_path.glob(".*"))


def test_values_survive_saving(tmp_path):
    nested = {"a": [1, 2.5, None, True, "x"], 3: {"b": torch.arange(3), "empty": []}, "c": torch.ones(2).bfloat16()}
    save_state(tmp_path, 0, nested)
    loaded = load_state(tmp_path)
    assert loaded["a"] == nested["a"] and loaded[3]["empty"] == []
    assert torch.equal(loaded[3]["b"], nested[3]["b"]) and loaded["c"].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="A state cannot hold"):
        save_state(tmp_path, 1, {"value": object()})
    assert load_state(tmp_path)["a"] == nested["a"]


DAMAGES = {
    "a truncated tensor file": lambda path: os.truncate(path / TENSORS, (path / TENSORS).stat().st_size // 2),
    "a truncated record": lambda path: os.truncate(path / STATE, (path / STATE).stat().st_size - 3),
    "an empty record": lambda path: os.truncate(path / STATE, 0),
    "a flipped bit of a tensor": lambda path: flip(path / TENSORS),
    "a changed number": lambda path: rewrite(path, '"index", 2', '"index", 1'),
    "no tensors": lambda path: (path / TENSORS).unlink(),
    "no record": lambda path: (path / STATE).unlink(),
    "a record of something else": lambda path: (path / STATE).write_text("[1]"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def rewrite(path, old, new):
    text = (path / STATE).read_text()
    assert old in text
    (path / STATE).write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_raises_or_the_previous_one_loads(damage, run):
    folder, expected = run
    state = folder / "state-00000002"
    shutil.copytree(state, folder / "state-00000009")  # a newer one
    DAMAGES[damage](folder / "state-00000009")
    with full_pipeline().resume(folder) as resumed:
        assert resumed.index == 2
        assert_same([next(resumed)], expected[2:3])
    shutil.rmtree(folder / "state-00000009")
    DAMAGES[damage](state)
    with pytest.raises(ValueError, match="`state_dir` must be a folder with a whole state, but state-00000002"):
        full_pipeline().resume(folder)


def test_folder_without_a_state_raises(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="`state_dir` must be a folder with a whole state"):
            full_pipeline().resume(folder)
    (tmp_path / ".state-00000001.unfinished").mkdir()
    with pytest.raises(ValueError, match="a whole state"):
        full_pipeline().resume(tmp_path)


@pytest.mark.parametrize("other", [0, 2])
def test_state_of_another_format_raises_with_both_versions(other, run):
    folder, _ = run
    rewrite(folder / "state-00000002", '"version": 1', f'"version": {other}')
    rewrite(folder / "state-00000002", '"tokentrim 0', '"tokentrim 9')
    with pytest.raises(ValueError, match=f"format 1, as tokentrim 0.*format {other}, by tokentrim 9"):
        full_pipeline().resume(folder)


def test_state_of_other_code_loads_with_a_warning(run, caplog):
    folder, _ = run
    load_state(folder)
    assert not caplog.records
    rewrite(folder / "state-00000002", '"tokentrim 0', '"tokentrim 9')
    load_state(folder)
    (told,) = caplog.messages
    assert re.search("written by tokentrim 9.* with torch .*, and goes on with tokentrim 0", told)


def test_the_code_knows_the_version_of_its_package():
    setup = (ROOT / "setup.cfg").read_text()
    assert run_state.CODE_VERSION == tokentrim.__version__ and f"version = {tokentrim.__version__}\n" in setup


def test_other_weights_raise(run):
    folder, expected = run
    for name, other in (("transformer", tiny_transformer(1)), ("vae", tiny_vae(1))):
        pipe = full_pipeline()
        setattr(pipe, name, other)
        with pytest.raises(ValueError, match=f"`{name}` must be the weights that the run began with"):
            pipe.resume(folder)
    pipe = full_pipeline()
    pipe.transformer.blocks[1].ffn.net[2].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="`transformer` must be the weights"):
        pipe.resume(folder)
    assert_same(list(full_pipeline().resume(folder)), expected[2:])


def test_other_checkpoint_settings_raise(run):
    folder, _ = run
    for pipe, name in (
        (full_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0)), "scheduler.shift"),
        (lcm(), "scheduler"),
        (full_pipeline(num_sink_frames=3), "num_sink_frames"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be .*, as the run began"):
            pipe.resume(folder)


def test_setting_of_the_checkpoint_that_the_call_overrides_may_change(tmp_path):
    with full_pipeline(method="plain").stream(PROMPT, state_dir=tmp_path, **settings(4, method="tokentrim")) as stream:
        next(stream)
    chunks = list(full_pipeline(method="tokentrim_plus").resume(tmp_path))
    assert chunks[-1].decisions[0]["reanchored"] is None


@pytest.mark.parametrize("before, after", [(None, "tokentrim_plus"), ("tokentrim_plus", "plain"), ("plain", None)])
def test_run_keeps_the_method_that_its_checkpoint_named(before, after, tmp_path):
    """Also if it is saved and resumed a second time, when the checkpoint names another method."""
    call = settings(6, window_size=30) | {"output_type": "latent"}
    expected = list(full_pipeline(method=before).stream(PROMPT, **call))
    call = settings(6, window_size=30) | {"output_type": "latent"}
    with full_pipeline(method=before).stream(PROMPT, state_dir=tmp_path, save_every=1, **call) as stream:
        next(stream), next(stream)
    for num_chunks in (2, 3):
        with full_pipeline(method=after).resume(tmp_path) as stream:
            for _ in range(num_chunks):
                chunk = next(stream)
    assert_same([chunk], expected[chunk.index : chunk.index + 1])


@pytest.mark.parametrize(
    "name, value", [("num_frames", 33), ("on_chunk", print), ("method", "plain"), ("nonsense", 1)]
)
def test_arguments_that_the_state_holds_raise(name, value, run):
    folder, _ = run
    with pytest.raises(ValueError, match=f"`{name}` must be left out"):
        full_pipeline().resume(folder, **{name: value})


def test_preview_vae_is_passed_again(tmp_path):
    from test_stream import Preview

    torch.manual_seed(0)
    preview = Preview()
    expected = list(full_pipeline().stream(PROMPT, preview_vae=preview, **settings(4)))
    with full_pipeline().stream(PROMPT, preview_vae=preview, **settings(4)) as stream:
        chunks = [next(stream), next(stream)]
        stream.save_state(tmp_path)
    with pytest.raises(ValueError, match="`preview_vae` must be the stream's"):
        full_pipeline().resume(tmp_path)
    with pytest.raises(ValueError, match="`preview_vae` must be the weights that the run began with"):
        full_pipeline().resume(tmp_path, preview_vae=Preview())
    assert_same([*chunks, *full_pipeline().resume(tmp_path, preview_vae=preview)], expected)


def test_stream_into_a_folder_with_a_state_raises(run):
    folder, _ = run
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(ValueError, match="`state_dir` must be a folder without a state: `pipe.resume"):
        full_pipeline().stream(PROMPT, state_dir=folder, **settings(4))
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_stream_without_a_folder_says_so(tmp_path):
    with full_pipeline().stream(PROMPT, **settings(2)) as stream, pytest.raises(ValueError, match="folder"):
        stream.save_state()


# Files


def video_run(folder, num_chunks):
    """A run that stops after some chunks, as an exception of its consumer stops it."""

    def on_chunk(index, latents, decisions):
        if index == num_chunks:
            raise ZeroDivisionError

    arguments = {"state_dir": folder / "run", "save_every": 2, "on_chunk": on_chunk, **settings(6, **EAGER)}
    stream = full_pipeline().stream(PROMPT, **arguments)
    try:
        stream.save_video(folder / "x.mp4", 8, progress=False)
    except ZeroDivisionError:
        pass


def resume_run(folder):
    return full_pipeline().resume(folder / "run", on_chunk=lambda *_: None)


def test_files_ahead_of_the_state_are_cut_back(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    video_run(whole.mkdir() or whole, None)
    video_run(cut.mkdir() or cut, 3)
    assert count(cut / "x.jsonl") == 3 and load_state(cut / "run")["run"]["index"] == 2
    resume_run(cut).save_video(cut / "x.mp4", 8, progress=False)
    assert files(cut) == files(whole)


def test_other_files_raise(tmp_path):
    video_run(tmp_path, 3)
    before = files(tmp_path)
    for path, fps, message in (("y.mp4", 8, "path"), ("x.mp4", 12, "fps")):
        with resume_run(tmp_path) as stream, pytest.raises(ValueError, match=f"`{message}`"):
            stream.save_video(tmp_path / path, fps, progress=False)
    assert files(tmp_path) == before
    (tmp_path / "x.jsonl").write_text("")
    with resume_run(tmp_path) as stream, pytest.raises(ValueError, match="x.jsonl"):
        stream.save_video(tmp_path / "x.mp4", 8, progress=False)
    (tmp_path / "x.mp4").unlink()
    with resume_run(tmp_path) as stream, pytest.raises(FileNotFoundError, match="x.mp4"):
        stream.save_video(tmp_path / "x.mp4", 8, progress=False)


def test_run_without_its_first_chunks_writes_no_file(tmp_path):
    arguments = {"state_dir": tmp_path / "run", "save_every": 1, **settings(3)}
    with full_pipeline().stream(PROMPT, **arguments) as stream:
        next(stream)
        next(stream)
    with full_pipeline().resume(tmp_path / "run") as stream, pytest.raises(ValueError, match="`path`"):
        stream.save_video(tmp_path / "x.mp4", 8, progress=False)
