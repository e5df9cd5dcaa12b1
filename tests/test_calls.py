"""Arguments in other forms than ours give the same video, or an error that says what to pass."""

import json
import threading

import numpy as np
import pytest
import torch
from builders import (
    CHUNK,
    embeds,
    far_pipeline,
    full_pipeline,
    generators,
    latent_pipeline,
    noise,
    processors,
    randn,
    roll,
    steady_noise,
    tiny_far,
    triggers,
)
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from tokentrim import ContextPolicy, Layout, TokenTrim, WindowLayout


CALL = {"prompt": "a red circle", "num_frames": 21, "height": 32, "width": 48}


# Settings


def test_window_all_overrides_the_checkpoints_window():
    pipe = latent_pipeline(window_size=3)
    output = roll(pipe, noise(4), window_size="all")
    assert torch.equal(output.frames, roll(latent_pipeline(), noise(4)).frames)
    assert not torch.equal(output.frames, roll(pipe, noise(4)).frames)
    assert WindowLayout("all").window_size is None
    assert latent_pipeline(window_size="all").plan(
        **CALL | {"prompt": None, "prompt_embeds": embeds(), "output_type": "latent"}
    )
    with pytest.raises(TypeError, match="`window_size` must be an int >= 1, or 'all', but is 'al'"):
        roll(pipe, noise(4), window_size="al")


def test_smallest_prune_fraction_evicts_one_token():
    output = roll(latent_pipeline(), steady_noise(5, [3]), prune_fraction=1e-9)
    assert triggers(output.decisions[0]) == [3] and len(output.decisions[0][3]["tokens"]) == 1
    json.dumps(output.decisions, allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make, latents", [(latent_pipeline, noise(5)), (lambda: far_pipeline(tiny_far()), None)])
def test_default_dtype_of_torch_changes_nothing(make, latents, dtype):
    pipe = make()
    latents = randn(1, 4, 11, 8, 12) if latents is None else latents
    method = ["tokentrim_plus", {"tokentrim": {"drift_sensitivity": 0.0}}]
    text = {"prompt_embeds": embeds()}  # drawn in fp32
    expected = roll(pipe, latents, method=method, **text)
    try:
        torch.set_default_dtype(dtype)
        output = roll(pipe, latents, method=method, **text)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output.frames, expected.frames) and output.decisions == expected.decisions


def test_numpy_numbers_and_arrays_are_accepted(tmp_path):
    plain = {
        "num_frames": 21,
        "sigmas": [1.0, 0.5],
        "chunk_partition": [3, 3],
        "guidance_scale": 1.5,
        "window_size": 9,
    }
    given = {
        "num_frames": np.int64(21),
        "sigmas": np.linspace(1, 0, 3)[:-1],
        "chunk_partition": np.array([3, 3]),
        "guidance_scale": np.float32(1.5),
        "window_size": np.int32(9),
        "method": {"tokentrim": {"prune_fraction": np.float32(0.5), "warmup_chunks": np.int8(1)}},
        "prompt_schedule": {np.int64(1): "a green square"},
    }
    plain |= {
        "method": {"tokentrim": {"prune_fraction": 0.5, "warmup_chunks": 1}},
        "prompt_schedule": {1: "a green square"},
    }
    expected = full_pipeline()(**CALL | plain, generator=generators(0), output_type="latent")
    output = full_pipeline()(**CALL | given, generator=generators(0), output_type="latent")
    assert torch.equal(output.frames, expected.frames)
    with full_pipeline().stream(**CALL | given, generator=generators(0), output_type="latent") as stream:
        next(stream)
        stream.save_state(tmp_path)
    (rest,) = full_pipeline().resume(tmp_path)  # nothing needs to be given again
    assert torch.equal(rest.latents, expected.frames[:, :, CHUNK:])
    sigmas = full_pipeline()(**CALL | plain | {"sigmas": torch.tensor([1.0, 0.5])}, generator=generators(0))
    assert sigmas.frames.shape[1] == 21
    policy = TokenTrim(prune_fraction=np.float32(0.5), warmup_chunks=np.int64(1))
    output = full_pipeline()(**CALL | plain | {"method": policy}, generator=generators(0), output_type="latent")
    assert torch.equal(output.frames, expected.frames)


@pytest.mark.parametrize("kind", [FlowMatchLCMScheduler, FlowMatchEulerDiscreteScheduler])
def test_scheduler_set_later_works(kind):
    pipe = full_pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    expected = full_pipeline(kind(shift=5.0))(**CALL, generator=generators(0)).frames
    assert (pipe(**CALL, generator=generators(0)).frames == expected).all()
    scheduler = kind(shift=1.0)
    scheduler.set_shift(5.0)
    pipe.scheduler = scheduler
    assert (pipe(**CALL, generator=generators(0)).frames == expected).all()
    pipe.scheduler = torch.nn.Identity()
    with pytest.raises(ValueError, match="`scheduler` must be a SchedulerMixin, but is 'Identity'"):
        pipe(**CALL)


def test_dynamic_shifting_is_refused_before_a_run():
    pipe = full_pipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="`scheduler` must be .*dynamic shifting"):
        pipe(**CALL)


# Prompts


@pytest.mark.parametrize(
    "given, name, other",
    [
        (
            {"prompt": None, "prompt_embeds": randn(1, 5, 32), "negative_prompt": "blue"},
            "prompt_embeds",
            "negative_prompt",
        ),
        ({"prompt": None, "prompt_embeds": randn(1, 5, 32)}, "prompt_embeds", "negative_prompt"),
        ({"negative_prompt_embeds": randn(1, 5, 32)}, "negative_prompt_embeds", "prompt"),
        ({"negative_prompt_embeds": randn(3, 8, 32)}, "negative_prompt_embeds", "prompt"),
    ],
)
def test_embeddings_and_text_of_different_lengths_raise(given, name, other):
    with pytest.raises(ValueError, match=rf"`{name}` must be \(1, 8, dim\) beside `{other}`.*\(\d, \d, 32\)"):
        full_pipeline()(**CALL | given, guidance_scale=2.0)
    full_pipeline().plan(**CALL | given)  # without guidance it does not matter


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_embeds": randn(1, 512, 32)},
        {"negative_prompt": "blue", "negative_prompt_embeds": randn(1, 512, 32), "guidance_scale": 2.0},
        {"prompt": ["a red circle"] * 400 + [None]},
        {"sigmas": list(np.linspace(0, 1, 500))},
        {"latents": np.zeros((30, 40, 50))},
        {"video": [list(range(1000))] * 3},
        {"method": {"tokentrim": {f"setting {number}": number for number in range(300)}}},
        {"video_latents": randn(1, 400, 4, 4, 6), "num_frames": 12 * 300 - 3, "chunk_partition": [3] * 300},
    ],
)
def test_no_message_is_longer_than_two_lines(given):
    with pytest.raises((TypeError, ValueError)) as caught:
        full_pipeline()(**CALL | given)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value), caught.value


# Frames to continue


def forms(video):
    """The same frames, (B, T, 3, H, W), in common forms; forms in bytes are rounded."""
    array = video.permute(0, 1, 3, 4, 2).numpy()
    return {
        "np": array,
        "pt": video,
        "one video": video[0],
        "list of arrays": list(array[0]),
        "list of tensors": list(video[0]),
        "list of videos": [array[0]],
    }


@pytest.mark.parametrize("form", ["np", "pt", "one video", "list of arrays", "list of tensors", "list of videos"])
def test_video_input_works_in_every_form(form):
    pipe, video = full_pipeline(), full_pipeline()(**CALL, output_type="pt", generator=generators(0)).frames
    expected = pipe.plan(**CALL | {"num_frames": 33, "video": video}).inputs.video
    assert torch.equal(pipe.plan(**CALL | {"num_frames": 33, "video": forms(video)[form]}).inputs.video, expected)


def test_output_frames_work_as_video_input(tmp_path):
    pipe = full_pipeline()
    outputs = {kind: pipe(**CALL, output_type=kind, generator=generators(0)).frames for kind in ("np", "pt", "pil")}
    call = CALL | {"num_frames": 33, "output_type": "latent"}
    given = {kind: pipe(**call, video=frames, generator=generators(1)).frames for kind, frames in outputs.items()}
    assert torch.equal(given["np"], given["pt"]) and (given["pil"] - given["pt"]).abs().max() < 0.2
    as_bytes = np.stack([np.stack(list(map(np.asarray, video))) for video in outputs["pil"]])
    of_bytes = pipe(**call, video=as_bytes, generator=generators(1)).frames
    torch.testing.assert_close(of_bytes, given["pil"], atol=1e-5, rtol=0)
    with pipe.stream(**call, video=outputs["pil"], generator=generators(1)) as stream:
        next(stream)
        stream.save_state(tmp_path)
    rest = [chunk.latents for chunk in full_pipeline().resume(tmp_path)]
    assert torch.equal(torch.cat(rest, dim=2), given["pil"][:, :, CHUNK:])
    image = outputs["pil"][0][0]
    assert pipe.plan(**call, video=image).sizes.chunk_partition == [1, 3, 3, 3]


@pytest.mark.parametrize("video", ["a.mp4", [], [[]], [1, 2], {"frames": 3}, 5, [None], np.zeros((3, 4))])
def test_invalid_video_raises_with_its_name(video):
    with pytest.raises((TypeError, ValueError), match="`video`"):
        full_pipeline()(**CALL, video=video)


# Policies and layouts of one's own


@pytest.mark.parametrize(
    "facts, error",
    [
        ({"chunk": 7}, ValueError),
        ({"quarantined": True}, ValueError),
        ({"x": float("nan")}, ValueError),
        ({"x": {1, 2}}, TypeError),
    ],
)
def test_facts_that_are_not_json_raise(facts, error):
    class Odd(ContextPolicy):
        def close(self, entered):
            return facts

    with pytest.raises(error, match="chunk 0: Odd.close"):
        roll(latent_pipeline(), noise(2), method=[Odd()])


def test_numpy_facts_become_plain_numbers():
    class Counting(ContextPolicy):
        def close(self, entered):
            return {"count": np.int64(3), "values": np.arange(2)}

    output = roll(latent_pipeline(), noise(1), method=[Counting()])
    assert output.decisions[0][0]["count"] == 3 and json.dumps(output.decisions, allow_nan=False)


@pytest.mark.parametrize("kept", [None, "all", 3, [1.5]])
def test_layout_that_keeps_no_list_raises(kept):
    class Odd(Layout):
        def keep(self, held, new):
            return kept

    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    with pytest.raises(TypeError, match="Odd.keep` must be a list of latent frames"):
        roll(pipe, noise(2), layout=Odd())
    assert processors(pipe.transformer) == before


# Random numbers


def test_run_without_a_generator_makes_one(tmp_path):
    """Other random draws change nothing, and a resumed run draws the same numbers."""
    call = {**CALL, "num_frames": 33, "output_type": "latent"}
    pipe, again = (full_pipeline(FlowMatchLCMScheduler(shift=5.0)) for _ in range(2))
    torch.manual_seed(1)
    expected = pipe(**call).frames
    assert not torch.equal(pipe(**call).frames, expected)
    torch.manual_seed(1)
    with pipe.stream(**call) as stream:
        chunks = [next(stream)]
        torch.randn(5)
        stream.save_state(tmp_path)
    chunks += again.resume(tmp_path)
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], dim=2), expected)


# Interrupted and failed runs


def test_interrupted_run_resumes_from_its_saved_state(tmp_path):
    steps, call = [], {**CALL, "num_frames": 33, "output_type": "latent"}

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = len(steps) == 3  # the first step of the second chunk
        return {}

    pipe = full_pipeline()
    before, expected = processors(pipe.transformer), pipe(**call, generator=generators(0)).frames
    arguments = {**call, "generator": generators(0), "callback_on_step_end": interrupt}
    with pipe.stream(**arguments, state_dir=tmp_path, save_every=1) as stream:
        (chunk,) = stream
    assert torch.equal(chunk.latents, expected[:, :, :CHUNK]) and processors(pipe.transformer) == before
    rest = [chunk.latents for chunk in pipe.resume(tmp_path, callback_on_step_end=lambda *_: {})]
    assert torch.equal(torch.cat(rest, dim=2), expected[:, :, CHUNK:])
    empty = pipe(**CALL, callback_on_step_end=lambda pipe, *_: setattr(pipe, "_interrupt", True) or {})
    with pytest.raises(ValueError, match="no chunk to show"):
        empty.filmstrip()


def failing(pipe, at):
    """The VAE runs out of memory once, in forward number `at` of its decoder."""
    forwards = []

    def fail(*_):
        forwards.append(1)
        if len(forwards) == at:
            raise torch.OutOfMemoryError("out of memory")

    pipe.vae.decoder.register_forward_pre_hook(fail)
    return pipe


@pytest.mark.parametrize("tiled", [False, True])
def test_out_of_memory_while_decoding_keeps_the_latents(tiled):
    expected = full_pipeline()(**CALL, generator=generators(0), output_type="latent").frames
    pipe = failing(full_pipeline(), 1 if tiled else 4)  # or in the second chunk
    if tiled:
        pipe.vae.enable_tiling()
    before = processors(pipe.transformer)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        pipe(**CALL, generator=generators(0))
    assert (
        torch.equal(caught.value.latents, expected)
        and "pipe.decode_latents(error.latents" in caught.value.__notes__[0]
    )
    assert processors(pipe.transformer) == before
    assert pipe.decode_latents(caught.value.latents, "np").shape[1] == 21


def test_stream_resumes_after_out_of_memory_while_decoding(tmp_path):
    expected = full_pipeline()(**CALL, num_videos_per_prompt=1, generator=generators(0)).frames
    pipe, seen = failing(full_pipeline(), 5), []
    call = {**CALL, "generator": generators(0), "on_chunk": lambda index, latents, decisions: seen.append(index)}
    with pytest.raises(torch.OutOfMemoryError), pipe.stream(**call, state_dir=tmp_path / "state") as stream:
        stream.save_video(tmp_path / "video.mp4", progress=False)
    assert seen == [0]
    with full_pipeline().resume(tmp_path / "state", on_chunk=call["on_chunk"]) as stream:
        assert stream.index == stream.first_chunk == 1
        (chunk,) = stream
    assert chunk.index == 1 and (chunk.frames == expected[:, 9:]).all() and seen == [0, 1]


# Two rollouts


def test_second_thread_on_a_transformer_raises():
    pipe, inside, go_on = full_pipeline(), threading.Event(), threading.Event()
    before, expected = processors(pipe.transformer), pipe(**CALL, generator=generators(0)).frames
    outputs = []

    def wait(pipe, step, timestep, tensors):
        inside.set()
        assert go_on.wait(60)
        return {}

    call = {**CALL, "generator": generators(0), "callback_on_step_end": wait}
    thread = threading.Thread(target=lambda: outputs.append(pipe(**call)))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="in a rollout already"):
        pipe(**CALL, guidance_scale=5.0)
    go_on.set()
    thread.join()
    assert (outputs[0].frames == expected).all() and processors(pipe.transformer) == before


def test_nested_call_raises_and_leaves_nothing():
    pipe = full_pipeline()
    before, expected = processors(pipe.transformer), pipe(**CALL, generator=generators(0)).frames
    with pytest.raises(RuntimeError, match="in a rollout already"):
        pipe(**CALL, on_chunk=lambda *_: pipe(**CALL))
    assert processors(pipe.transformer) == before
    assert (pipe(**CALL, generator=generators(0)).frames == expected).all()
