# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A stream yields the call's video chunk by chunk, with or without an end, and leaves nothing behind."""

import gc
import json

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    TEXT_DIM,
    TEXT_LENGTH,
    case_id,
    embeds,
    far_components,
    full_pipeline,
    latent_pipeline,
    processors,
    quiet,
    randn,
)
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

from tokentrim import RollingKVCache, TokenTrimPipeline


PROMPT = "a red circle moving right over a blue background"
EAGER = {"drift_sensitivity": 0.0, "warmup_chunks": 1, "prune_fraction": 0.4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(num_chunks=5, seed=0, **others):
    """Settings for a video of this many chunks; `None` is endless."""
    num_frames = None if num_chunks is None else 4 * CHUNK * num_chunks - 3
    return {"num_frames": num_frames, "window_size": 9, "generator": seeded(seed), **EAGER, **others}


def first(stream, num_chunks):
    with stream:
        return [next(stream) for _ in range(num_chunks)]


def latents_of(chunks):
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def joined(parts, output_type):
    if output_type == "pil":
        return np.stack([np.stack(list(map(np.asarray, sum(videos, [])))) for videos in zip(*parts)])
    return torch.cat(parts, dim=1) if output_type == "pt" else np.concatenate(parts, axis=1)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_a_stream_gives_the_chunks_of_the_call(output_type):
    pipe = full_pipeline()
    output = pipe(PROMPT, output_type=output_type, **settings())
    chunks = list(pipe.stream(PROMPT, output_type=output_type, **settings()))
    assert [chunk.index for chunk in chunks] == list(range(5))
    assert [[chunk.decisions[0]] for chunk in chunks] == [[each] for each in output.decisions[0]]
    assert any(each["trim"] for each in output.decisions[0])
    json.dumps([chunk.decisions for chunk in chunks])
    if output_type == "latent":
        assert all(chunk.frames is None for chunk in chunks)
        torch.testing.assert_close(latents_of(chunks), output.frames, atol=0, rtol=0)
        return
    frames, expected = joined([chunk.frames for chunk in chunks], output_type), output.frames
    expected = joined([expected], output_type) if output_type == "pil" else expected
    assert frames.shape[1] == 57 and (frames == expected).all()
    assert latents_of(chunks).shape == (1, CHANNELS, 5 * CHUNK, 4, 6)


def test_a_stream_of_a_batch_equals_the_call():
    pipe, prompts = full_pipeline(), [PROMPT, "a green square"]
    generators = [[seeded(3), seeded(4)] for _ in range(2)]
    output = pipe(prompts, **settings(generator=generators[0]))
    chunks = list(pipe.stream(prompts, **settings(generator=generators[1])))
    assert (np.concatenate([chunk.frames for chunk in chunks], axis=1) == output.frames).all()
    assert [[chunk.decisions[video] for chunk in chunks] for video in range(2)] == output.decisions


def test_one_generator_equals_a_list_with_it():
    for pipe in (full_pipeline(), full_pipeline(FlowMatchLCMScheduler(shift=5.0))):
        videos = [pipe(PROMPT, output_type="latent", **settings(generator=each)) for each in (seeded(3), [seeded(3)])]
        torch.testing.assert_close(videos[0].frames, videos[1].frames, atol=0, rtol=0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_regeneration_draws_no_noise_of_later_chunks(stochastic):
    """A batch with regenerations equals single runs: no chunk begins from used noise."""
    pipe = full_pipeline(FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=stochastic))
    arguments = {**settings(6), "output_type": "latent"}
    output = pipe([PROMPT, PROMPT], **{**arguments, "generator": [seeded(1), seeded(2)]})
    trims = [[each["trim"] for each in decisions] for decisions in output.decisions]
    assert any(trims[0][:-1])
    for video in range(2):
        for generator in (seeded(video + 1), [seeded(video + 1)]):
            single = pipe(PROMPT, **{**arguments, "generator": generator})
            torch.testing.assert_close(output.frames[video], single.frames[0], atol=1e-5, rtol=0)


SCHEDULERS = {"Euler": lambda: None, "LCM": lambda: FlowMatchLCMScheduler(shift=5.0)}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("generators", [1, 2])
def test_videos_of_one_seed_begin_alike(scheduler, generators):
    pipe = full_pipeline(scheduler())
    prompts = [PROMPT, "a green square"][:generators]

    def chunks_of(num_chunks):
        generator = seeded(5) if generators == 1 else [seeded(5), seeded(6)]
        return first(pipe.stream(prompts, **settings(num_chunks, generator=generator)), min(num_chunks or 5, 5))

    endless, preview, video = chunks_of(None), chunks_of(2), chunks_of(7)
    for chunks in (endless, preview):
        torch.testing.assert_close(latents_of(chunks), latents_of(video[: len(chunks)]), atol=0, rtol=0)
        assert [chunk.decisions for chunk in chunks] == [chunk.decisions for chunk in video[: len(chunks)]]
        assert all((one.frames == other.frames).all() for one, other in zip(chunks, video))


def test_stream_without_a_length_is_endless():
    pipe = full_pipeline()
    stream = pipe.stream(PROMPT, output_type="latent", method="plain", window_size=6)
    assert [chunk.index for chunk in first(stream, 9)] == list(range(9))
    assert len(list(pipe(PROMPT, output_type="latent", method="plain").decisions[0])) == 7  # a call has 81 frames


def test_given_noise_makes_the_same_chunks():
    pipe = latent_pipeline()
    noise = randn(1, CHANNELS, 4 * CHUNK, 4, 6)
    common = {"prompt_embeds": embeds(), "latents": noise, "output_type": "latent", "num_inference_steps": 2}
    output = pipe(**common)
    torch.testing.assert_close(latents_of(list(pipe.stream(**common))), output.frames, atol=0, rtol=0)


def test_frames_to_continue_are_chunks_of_the_stream():
    pipe = full_pipeline()
    given = randn(1, 2 * CHUNK, CHANNELS, 4, 6)
    output = pipe(PROMPT, video_latents=given, output_type="latent", **settings())
    chunks = list(pipe.stream(PROMPT, video_latents=given, output_type="latent", **settings()))
    torch.testing.assert_close(latents_of(chunks), output.frames, atol=0, rtol=0)
    torch.testing.assert_close(chunks[0].latents, given[:, :CHUNK].transpose(1, 2), atol=0, rtol=0)


# However it ends, nothing stays


def stop_by_close(pipe):
    stream = pipe.stream(PROMPT, **settings(None))
    next(stream)
    stream.close()
    stream.close()  # again is no harm
    with pytest.raises(StopIteration):
        next(stream)


def stop_by_leaving(pipe):
    with pipe.stream(PROMPT, **settings(None)) as stream:
        for chunk in stream:
            if chunk.index == 2:
                break


def stop_by_the_consumer(pipe):
    with pytest.raises(ZeroDivisionError), pipe.stream(PROMPT, **settings(None)) as stream:
        for chunk in stream:
            1 / (chunk.index - 1)


def stop_by_a_step_callback(pipe):
    def callback(pipe, step, timestep, tensors):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # without a `with`
        next(pipe.stream(PROMPT, callback_on_step_end=callback, **settings(None)))


def stop_by_on_chunk(pipe):
    def on_chunk(index, latents, decisions):
        1 / (index - 1)

    stream = pipe.stream(PROMPT, on_chunk=on_chunk, **settings(None))
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert next(stream, None) is None


def stop_by_interrupt(pipe):
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    assert list(pipe.stream(PROMPT, callback_on_step_end=callback, **settings(None))) == []


def stop_by_deleting(pipe):
    stream = pipe.stream(PROMPT, **settings(None))
    next(stream)
    del stream
    gc.collect()


def stop_by_never_starting(pipe):
    pipe.stream(PROMPT, **settings(None))


def stop_at_the_end(pipe):
    list(pipe.stream(PROMPT, **settings(2)))


def stop_by_another_prompt_that_is_no_good(pipe):
    with pytest.raises(ValueError), pipe.stream(PROMPT, **settings(None)) as stream:
        next(stream)
        stream.set_prompt("a green circle", transition="jump")


STOPS = [each for name, each in globals().items() if name.startswith("stop_")]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.__name__)
def test_stream_leaves_nothing_however_it_ends(stop):
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0))
    before, timesteps = processors(pipe.transformer), pipe.transformer.condition_embedder.timesteps_proj
    expected = pipe(PROMPT, **settings(4))
    own = set(vars(pipe))
    stop(pipe)
    assert processors(pipe.transformer) == before
    assert pipe.transformer.condition_embedder.timesteps_proj is timesteps
    assert set(vars(pipe)) == own
    again = pipe(PROMPT, **settings(4))
    assert (again.frames == expected.frames).all() and again.decisions == expected.decisions


@pytest.mark.parametrize("stop", [stop_by_close, stop_by_leaving, stop_by_on_chunk, stop_by_deleting])
def test_the_cache_is_freed(stop):
    def held():
        gc.collect()
        return sum(type(each) is RollingKVCache for each in gc.get_objects())

    pipe, before = full_pipeline(), held()
    stop(pipe)
    assert held() == before


def test_closed_stream_frees_its_cache_while_referenced():
    pipe = full_pipeline()
    stream = pipe.stream(PROMPT, **settings(None))
    next(stream)
    stream.close()
    gc.collect()
    assert not any(type(each) is RollingKVCache for each in gc.get_objects())
    for attempt in (lambda: stream.index, lambda: stream.set_prompt("a"), stream.save_state):
        with pytest.raises(RuntimeError, match="The stream is closed"):
            attempt()


def test_second_run_while_a_stream_is_open_raises():
    pipe = full_pipeline()
    expected = list(pipe.stream(PROMPT, **settings(3)))
    with pipe.stream(PROMPT, **settings(3)) as stream:
        chunks = [next(stream)]
        with pytest.raises(RuntimeError, match="in a rollout already"):
            pipe("a green circle", num_inference_steps=4, guidance_scale=3.0)
        chunks += list(stream)
    assert all((one.frames == other.frames).all() for one, other in zip(chunks, expected))


# What it tells


@pytest.mark.parametrize("given", [0, 2])
def test_on_chunk_is_called_once_for_each_generated_chunk_with_copies(given):
    calls, pipe = [], full_pipeline()

    def on_chunk(index, latents, decisions):
        calls.append((index, latents.clone(), [dict(each) for each in decisions]))
        latents.zero_()
        decisions.clear()

    common = {"video_latents": randn(1, given * CHUNK, CHANNELS, 4, 6)} if given else {}
    chunks = list(pipe.stream(PROMPT, on_chunk=on_chunk, **common, **settings()))
    assert [index for index, *_ in calls] == list(range(given, 5))
    for index, latents, decisions in calls:
        torch.testing.assert_close(latents, chunks[index].latents, atol=0, rtol=0)
        assert decisions == chunks[index].decisions
    expected = list(pipe.stream(PROMPT, **common, **settings()))
    torch.testing.assert_close(latents_of(chunks), latents_of(expected), atol=0, rtol=0)


def test_stream_knows_its_index_and_grid():
    stream = full_pipeline().stream(PROMPT, **settings(3))
    assert stream.grid == (2, 3) and stream.index == 0
    with stream:
        next(stream)
        assert stream.index == 1


def test_the_first_chunk_of_a_long_video_takes_the_steps_of_one_chunk():
    pipe, calls = full_pipeline(), []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(None))
    decodes = []
    other = pipe.vae.decoder.register_forward_hook(lambda *_: decodes.append(None))
    with pipe.stream(PROMPT, **settings(400)) as stream:
        next(stream)
        assert len(calls) == 2 + 1  # steps and commit
        assert len(decodes) == CHUNK
    hook.remove()
    other.remove()


# Decoding


class Preview(torch.nn.Module):
    """Forgets its past, and gives `factor` frames for each latent frame."""

    def __init__(self, factor=4):
        super().__init__()
        self.mix = torch.nn.Conv3d(CHANNELS, 3, 1)
        self.factor = factor

    def decode(self, latents):
        frames = self.mix(latents).repeat_interleave(self.factor, dim=2).repeat_interleave(8, dim=3)
        return frames.repeat_interleave(8, dim=4).clamp(-1, 1)


@pytest.mark.parametrize("factor", [1, 4])
def test_preview_vae_decodes_instead_of_the_vae(factor):
    torch.manual_seed(0)
    pipe, preview = full_pipeline(), Preview(factor)
    pipe.vae_scale_factor_temporal = factor  # of the world's VAE
    arguments = {**settings(4), "num_frames": factor * (4 * CHUNK - 1) + 1}
    chunks = list(pipe.stream(PROMPT, preview_vae=preview, output_type="pt", **arguments))
    assert [chunk.frames.shape[1] for chunk in chunks] == [factor * CHUNK] * 4
    expected = preview.decode(latents_of(chunks)).transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(torch.cat([chunk.frames for chunk in chunks], dim=1), expected)


def test_latents_do_not_depend_on_the_preview_vae():
    pipe = full_pipeline()
    chunks, others = list(pipe.stream(PROMPT, **settings())), pipe.stream(PROMPT, preview_vae=Preview(), **settings())
    torch.testing.assert_close(latents_of(chunks), latents_of(list(others)), atol=0, rtol=0)


def test_tiled_vae_works_in_a_call_and_raises_in_a_stream():
    pipe, decodes = full_pipeline(), []
    pipe.vae.enable_tiling()
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **others: decodes.append(latents.shape) or decode(latents, **others)
    output = pipe(PROMPT, **settings(3))
    assert output.frames.shape[1] == 33 and decodes == [(1, CHANNELS, 3 * CHUNK, 4, 6)]
    with pytest.raises(ValueError, match="disable_tiling"):
        pipe.stream(PROMPT, **settings(3))
    assert len(list(pipe.stream(PROMPT, output_type="latent", **settings(3)))) == 3


# Prompts


def test_set_prompt_equals_a_schedule():
    pipe = full_pipeline()
    for transition in ("keep", "recache", "flush", "cut"):
        schedule = {"prompt_schedule": {2: "a green square"}, "prompt_transition": transition}
        expected = list(pipe.stream(PROMPT, output_type="latent", **schedule, **settings()))
        with pipe.stream(PROMPT, output_type="latent", **settings()) as stream:
            chunks = [next(stream), next(stream)]
            stream.set_prompt("a green square", transition)
            chunks += stream
        torch.testing.assert_close(latents_of(chunks), latents_of(expected), atol=0, rtol=0)
        assert [chunk.decisions for chunk in chunks] == [chunk.decisions for chunk in expected]


def test_set_prompt_twice_before_a_chunk_keeps_the_last():
    pipe, chunks = full_pipeline(), []
    for prompts in (["a green square"], ["a blue circle", "a green square"]):
        with pipe.stream(PROMPT, output_type="latent", **settings()) as stream:
            next(stream)
            for prompt in prompts:
                stream.set_prompt(prompt)
            chunks.append(next(stream).latents)
    torch.testing.assert_close(*chunks, atol=0, rtol=0)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"prompt": 3}, TypeError, "prompt"),
        ({"prompt": ["a", "b"]}, ValueError, "prompt"),
        ({"prompt": torch.zeros(1, TEXT_LENGTH, TEXT_DIM + 1)}, ValueError, "prompt"),
        ({"prompt": torch.zeros(1, TEXT_LENGTH + 1, TEXT_DIM)}, ValueError, "prompt"),
        ({"prompt": "a", "transition": "jump"}, ValueError, "transition"),
        ({"prompt": "a", "transition": 3}, TypeError, "transition"),
        ({"prompt": "a", "blend_chunks": -1}, ValueError, "blend_chunks"),
        ({"prompt": "a", "blend_chunks": 1.5}, TypeError, "blend_chunks"),
    ],
)
def test_invalid_set_prompt_raises_and_the_stream_continues(arguments, error, message):
    pipe = full_pipeline()
    expected = latents_of(list(pipe.stream(PROMPT, output_type="latent", **settings(3))))
    with pipe.stream(PROMPT, output_type="latent", **settings(3)) as stream:
        chunks = [next(stream)]
        with pytest.raises(error, match=message):
            stream.set_prompt(**arguments)
        chunks += stream
    torch.testing.assert_close(latents_of(chunks), expected, atol=0, rtol=0)


# Files


def test_save_video_writes_the_frames_of_the_stream(tmp_path):
    pipe = full_pipeline()
    prompts, generator = [PROMPT, "a green square"], [seeded(1), seeded(2)]
    paths = pipe.stream(prompts, **settings(3, generator=generator)).save_video(tmp_path / "x.mp4", 8, progress=False)
    assert paths == [tmp_path / "x-0.mp4", tmp_path / "x-1.mp4"]
    output = pipe(prompts, **settings(3, generator=[seeded(1), seeded(2)]))
    for video, (path, decisions) in enumerate(zip(paths, output.decisions)):
        assert len(imageio.imread(path)) == 33 and imageio.immeta(path)["fps"] == 8
        assert path.read_bytes() == output.save_video(tmp_path / "own.mp4", 8, video).read_bytes()
        assert [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()] == decisions


def test_save_video_shows_chunks_seconds_rate_events_and_memory(tmp_path, capsys):
    full_pipeline().stream(PROMPT, **settings(3)).save_video(tmp_path / "x.mp4", 8)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "4.1 s" in shown and "frames/s" in shown and "GiB" in shown
    assert "0 held, 0 trimmed, 0 quarantined" in shown


def test_save_video_of_latents_raises(tmp_path):
    with full_pipeline().stream(PROMPT, output_type="latent", **settings(2)) as stream:
        with pytest.raises(ValueError, match="output_type"):
            stream.save_video(tmp_path / "x.mp4")
        assert not list(tmp_path.iterdir())
        assert next(stream).index == 0


# Arguments


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"output_type": "gif"}, ValueError, "output_type"),
        ({"num_frames": 0}, ValueError, "num_frames"),
        ({"save_every": 0, "state_dir": "x"}, ValueError, "save_every"),
        ({"save_every": 2.0}, TypeError, "save_every"),
        ({"preview_vae": object()}, TypeError, "preview_vae"),
        ({"unknown": 1}, TypeError, "unknown"),
        ({"chunk_partition": [3, 0], "num_frames": None}, ValueError, "chunk_partition"),
        ({"generator": [torch.Generator(), torch.Generator()]}, ValueError, "generator"),
        ({"on_chunk": 3}, TypeError, "on_chunk"),
        ({"prompt": None}, ValueError, "prompt"),
    ],
    ids=case_id,
)
def test_wrong_arguments_raise_at_once(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = full_pipeline()
    before = processors(pipe.transformer)
    with pytest.raises(error, match=message):
        pipe.stream(**{"prompt": PROMPT, **settings(), **arguments})
    assert processors(pipe.transformer) == before and not list(tmp_path.iterdir())


def test_endless_call_raises():
    pipe = full_pipeline()
    assert len(pipe.plan(PROMPT, num_frames=None).sizes.chunk_partition) == 7  # the default


def test_far_and_unipc_stream_without_an_end():
    pipe = quiet(TokenTrimPipeline(**far_components()))
    arguments = {"height": 64, "width": 96, "max_sequence_length": TEXT_LENGTH, "num_inference_steps": 2}
    arguments |= {"output_type": "latent", "method": "plain"}
    chunks = first(pipe.stream(PROMPT, num_frames=None, generator=seeded(), **arguments), 4)
    assert [chunk.latents.shape[2] for chunk in chunks] == [1, 2, 2, 2]
    video = list(pipe.stream(PROMPT, num_frames=25, generator=seeded(), **arguments))
    torch.testing.assert_close(latents_of(chunks), latents_of(video), atol=0, rtol=0)

    pipe = full_pipeline(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    chunks = first(pipe.stream(PROMPT, **settings(None)), 3)
    torch.testing.assert_close(
        latents_of(chunks), latents_of(list(pipe.stream(PROMPT, **settings(3)))), atol=0, rtol=0
    )
