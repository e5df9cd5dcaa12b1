"""`stream.back`: chunks are taken back, and made again to the same bits, or with another seed or prompt."""

import json
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from builders import CHUNK, far_components, full_pipeline, quiet
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_files.packing import pack_state
from tokentrim.tokentrim_files.run_state import list_numbers


PROMPT = "a red circle moving right over a blue background"
EAGER = {"drift_sensitivity": 0.0, "warmup_chunks": 1, "prune_fraction": 0.4}
TWO = {"prompt": [PROMPT, "a green square"], "method": ["tokentrim", "tokentrim_plus"], **EAGER}


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def solver():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


CASES = {  # scheduler and call; 5 chunks
    "window": (lambda: FlowMatchLCMScheduler(shift=5.0), {"prompt": PROMPT, "window_size": 9, **EAGER}),
    "two videos": (lambda: FlowMatchLCMScheduler(shift=5.0), {**TWO, "window_size": 15, "seeds": (1, 2)}),
    "solver": (solver, {"prompt": PROMPT, "window_size": 9}),
    "rolling": (
        lambda: FlowMatchLCMScheduler(shift=5.0),
        {"prompt": PROMPT, "rollout": "rolling_forcing", "window_size": 15, "num_inference_steps": 3, **EAGER},
    ),
    "rewritten keys": (lambda: FlowMatchLCMScheduler(shift=5.0), {"prompt": PROMPT, "layout": "memrope"}),
    "prompts": (
        lambda: FlowMatchLCMScheduler(shift=5.0),
        {
            "prompt": PROMPT,
            "prompt_schedule": {1: "a blue circle", 3: "a red square", 4: "a green circle"},
            "prompt_transition": {1: "recache", 3: "flush", 4: "cut"},
            "layout": {"infinity_rope": {"window_size": 9}},
            **EAGER,
        },
    ),
}


def start(case, **others):
    scheduler, call = CASES[case]
    call = {"seeds": (0,), "num_frames": 4 * CHUNK * 5 - 3, "output_type": "np", **call, **others}
    return full_pipeline(scheduler()).stream(generator=seeded(*call.pop("seeds")), **call)


def assert_same_chunks(ours, theirs):
    assert [chunk.index for chunk in ours] == [chunk.index for chunk in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.latents.equal(other.latents) and (one.frames == other.frames).all()
        assert one.decisions == other.decisions


def assert_same_state(one, other):
    (ours, our_tensors), (theirs, their_tensors) = (pack_state(each.run.state_dict()) for each in (one, other))
    assert ours == theirs and len(our_tensors) > 10
    assert all(tensor.equal(their_tensors[name]) for name, tensor in our_tensors.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_chunks_taken_back_come_out_the_same(case, on_disk, tmp_path):
    expected = list(start(case))
    with start(case, keep_states=2, state_dir=tmp_path / "run" if on_disk else None) as stream:
        chunks = [next(stream) for _ in range(4)]
        stream.back(2)
        assert stream.index == 2 and str(stream).startswith("2 of 5") or "2 videos, 2 of 5" in str(stream)
        again = [next(stream), next(stream), next(stream)]
        stream.back(1)  # after the last chunk, which no pass commits
        again = [*again[:2], *stream]
    assert_same_chunks([*chunks[:2], *again], expected)
    assert_same_chunks(chunks, expected[:4])


@pytest.mark.parametrize("case", ["window", "two videos", "solver", "rolling"])
def test_another_seed_makes_what_a_run_with_it_from_there_makes(case):
    other = seeded(*(seed + 7 for seed in CASES[case][1].get("seeds", (0,))))
    with start(case) as straight, start(case, keep_states=3) as stream:
        begin = [next(straight), next(straight)]
        straight.set_generator(other)
        first_take = [next(stream) for _ in range(4)]
        stream.back(2, generator=other)
        ours, theirs = [next(stream), next(stream)], [next(straight), next(straight)]
        assert_same_chunks(ours, theirs)
        assert_same_state(stream, straight)
        assert_same_chunks(first_take[:2], begin)
        assert not first_take[3].latents.equal(ours[1].latents)
        assert_same_chunks(list(stream), list(straight))


def test_another_prompt_may_follow_and_several_takes_begin_alike():
    with start("window") as straight, start("window", keep_states=1) as stream:
        next(straight), next(stream)
        straight.set_prompt("a green square")
        for prompt in ("a blue square", "a green square"):
            next(stream)
            stream.back()
            stream.set_prompt(prompt)
        assert_same_chunks(list(stream), list(straight))


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_growing_files_are_cut_back(on_disk, tmp_path):
    """`on_chunk` takes chunk 2 back once, with another seed, and chunk 4 twice."""
    takes, seen = {2: 1, 4: 2}, []

    def take_back(index, latents, decisions):
        seen.append(index)
        if takes.get(index, 0):
            takes[index] -= 1
            stream.back(1, generator=seeded(len(seen), 50 + len(seen)))

    call = {**CASES["two videos"][1], "num_frames": 4 * CHUNK * 5 - 3, "on_chunk": take_back}
    generator, state_dir = seeded(*call.pop("seeds")), tmp_path / "run" if on_disk else None
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0))
    stream = pipe.stream(generator=generator, keep_states=1, state_dir=state_dir, **call)
    stream.save_video(tmp_path / "x.mp4", progress=False)
    assert seen == [0, 1, 2, 2, 3, 4, 4, 4]
    seeds = {2: (3, 53), 4: (7, 57)}

    def reseed(index, latents, decisions):
        if index + 1 in seeds:
            other.set_generator(seeded(*seeds[index + 1]))

    other = pipe.stream(generator=seeded(1, 2), **{**call, "on_chunk": reseed})
    other.save_video(tmp_path / "y.mp4", progress=False)
    for video in range(2):
        assert (tmp_path / f"x-{video}.mp4").read_bytes() == (tmp_path / f"y-{video}.mp4").read_bytes()
        lines = [(tmp_path / f"{name}-{video}.jsonl").read_text() for name in "xy"]
        assert lines[0] == lines[1] and [json.loads(each)["chunk"] for each in lines[0].splitlines()] == [*range(5)]
        assert len(imageio.imread(tmp_path / f"x-{video}.mp4")) == 4 * CHUNK * 5 - 3


def test_a_resumed_stream_goes_back_beyond_where_it_was_cut(tmp_path):
    expected = list(start("window"))
    with start("window", keep_states=2, state_dir=tmp_path / "run") as stream:
        for _ in range(4):
            next(stream)
    assert list_numbers(tmp_path / "run") == [1, 2, 3]
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0))
    with pipe.resume(tmp_path / "run") as stream:
        assert stream.index == 3
        stream.back(2)
        assert list_numbers(tmp_path / "run") == [1]
        assert_same_chunks(list(stream), expected[1:])


def test_a_take_that_was_given_up_is_not_resumed(tmp_path):
    """What another seed made is saved instead of the states of the chunks that were taken back."""
    call = {**CASES["window"][1], "num_frames": 4 * CHUNK * 5 - 3}
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0))
    with pipe.stream(generator=seeded(0), keep_states=2, state_dir=tmp_path / "run", **call) as stream:
        for _ in range(3):
            next(stream)
        stream.back(2, generator=seeded(9))
        kept = [next(stream)]
        stream.save_state()
    with pipe.resume(tmp_path / "run") as stream:
        rest = list(stream)
    with pipe.stream(generator=seeded(0), **call) as straight:
        next(straight)
        straight.set_generator(seeded(9))
        assert_same_chunks([*kept, *rest], list(straight))


def test_far_goes_back():
    pipe = quiet(TokenTrimPipeline(**far_components()))
    size = {"height": 64, "width": 96, "max_sequence_length": 8, "num_inference_steps": 2, "output_type": "latent"}
    call = {"num_frames": 25, "method": {"tokentrim": EAGER}, **size}
    expected = [chunk.latents for chunk in pipe.stream(PROMPT, generator=seeded(0), **call)]
    with pipe.stream(PROMPT, generator=seeded(0), keep_states=2, **call) as stream:
        begin = [next(stream).latents for _ in range(3)]
        stream.back(2)
        again = [chunk.latents for chunk in stream]
    assert all(map(torch.equal, [begin[0], *again], expected)) and len(again) + 1 == len(expected)


def test_what_cannot_be_taken_back_raises_and_changes_nothing(tmp_path):
    expected = list(start("window"))
    with start("window", keep_states=2) as stream:
        chunks = [next(stream)]
        for wrong, message in {
            2: r"`num_chunks` must be one of \[1\], the chunks back that have a state, but is 2",
            0: "`num_chunks` must be an int >= 1, but is 0",
        }.items():
            with pytest.raises(ValueError, match=message):
                stream.back(wrong)
        for wrong in (7, [seeded(0)], "seed"):
            with pytest.raises(TypeError, match="`generator` must be a torch.Generator, as the call's"):
                stream.back(1, generator=wrong)
        assert_same_chunks([*chunks, *stream], expected)
    with pytest.raises(RuntimeError, match="closed"):
        stream.back()
    with start("window") as stream:
        next(stream)
        with pytest.raises(ValueError, match="0 in a stream without `keep_states`, but is 1"):
            stream.back()
    with start("two videos", keep_states=1) as stream:
        next(stream)
        with pytest.raises(TypeError, match="a list of 2 generators, as the call's"):
            stream.back(generator=seeded(0))
    with pytest.raises(ValueError, match="`keep_states` must be an int >= 0"):
        start("window", keep_states=-1)
    assert not list(Path(tmp_path).iterdir())
