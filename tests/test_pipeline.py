"""The pipeline as a pipeline of Diffusers."""

import gc
import json
import re
import warnings

import numpy as np
import pytest
import torch
from builders import (
    CHUNK,
    embeds,
    full_pipeline,
    generators,
    latent_pipeline,
    noise,
    processors,
    quiet,
    randn,
    roll,
    steady_noise,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
    triggers,
)
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback

from tokentrim import (
    RollingKVCache,
    TokenTrimFlowMapEulerDiscreteScheduler,
    TokenTrimFlowMatchEulerDiscreteScheduler,
    TokenTrimFlowMatchLCMScheduler,
    TokenTrimPipeline,
)
from tokentrim.tokentrim_policies.trim import SeverityMonitor
from tokentrim.tokentrim_views.layout import Layout


PROMPT = "a red circle moving right over a blue background"
needs_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")


# Output


def test_output_types_show_the_same_video():
    outputs = {
        kind: full_pipeline()(PROMPT, num_frames=21, generator=generators(0), output_type=kind).frames
        for kind in ("latent", "pt", "np", "pil")
    }
    assert outputs["latent"].shape == (1, 4, 6, 4, 6)
    assert outputs["np"].shape == (1, 21, 32, 48, 3)
    np.testing.assert_allclose(outputs["pt"].permute(0, 1, 3, 4, 2), outputs["np"], atol=1e-6)
    np.testing.assert_allclose(np.stack(outputs["pil"][0]) / 255, outputs["np"][0], atol=0.51 / 255)

    vae = tiny_vae()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    decoded = vae.decode(outputs["latent"] * std + mean, return_dict=False)[0]
    expected = (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(outputs["pt"], expected, atol=1e-5, rtol=0)


def test_return_dict_false_gives_a_tuple_with_the_video_first():
    output = roll(latent_pipeline(), noise(4))
    frames, decisions = roll(latent_pipeline(), noise(4), return_dict=False)
    assert torch.equal(frames, output.frames)
    assert decisions == output.decisions


def test_initial_noise_comes_from_the_generator():
    size = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 2}
    drawn = latent_pipeline()(
        prompt_embeds=embeds(), generator=torch.Generator().manual_seed(3), output_type="latent", **size
    )
    generator = torch.Generator().manual_seed(3)
    chunks = [torch.randn(noise(1).shape, generator=generator) for _ in range(3)]  # in order, chunk by chunk
    given = roll(latent_pipeline(), torch.cat(chunks, dim=2))
    assert torch.equal(drawn.frames, given.frames)
    other = latent_pipeline()(prompt_embeds=embeds(), output_type="latent", **size)
    assert other.frames.shape == given.frames.shape and not torch.equal(other.frames, given.frames)


def test_prompt_embeds_equal_the_prompt():
    pipe = full_pipeline()
    text, negative = pipe.encode_prompt(PROMPT, "green", max_sequence_length=8)
    settings = {"num_frames": 21, "guidance_scale": 2.0, "output_type": "latent"}
    prompts = pipe(PROMPT, negative_prompt="green", generator=generators(0), **settings)
    embeddings = pipe(prompt_embeds=text, negative_prompt_embeds=negative, generator=generators(0), **settings)
    assert torch.equal(prompts.frames, embeddings.frames)
    other = pipe("a green square", negative_prompt="green", generator=generators(0), **settings)
    assert not torch.equal(prompts.frames, other.frames)


def test_bf16_transformer_stays_close_to_fp32():
    transformer = tiny_transformer()
    exact = roll(latent_pipeline(transformer), steady_noise(6, [3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rough = roll(latent_pipeline(transformer.bfloat16()), steady_noise(6, [3]))
    assert rough.frames.dtype == torch.float32
    assert triggers(rough.decisions[0]) == triggers(exact.decisions[0]) == [3]
    assert (rough.frames - exact.frames).abs().mean() < 0.02 * exact.frames.abs().mean()


# Schedule and chunks


def test_default_sigmas_are_linear():
    given = roll(latent_pipeline(), noise(2), sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.equal(roll(latent_pipeline(), noise(2), num_inference_steps=4).frames, given.frames)


SINGLE_STEP = [
    TokenTrimFlowMatchEulerDiscreteScheduler,
    TokenTrimFlowMatchLCMScheduler,
    TokenTrimFlowMapEulerDiscreteScheduler,
]


@pytest.mark.parametrize("scheduler", SINGLE_STEP)
def test_scheduler_timesteps_change_nothing(scheduler):
    pipe = latent_pipeline(scheduler=scheduler(shift=5.0))
    by_default = roll(pipe, noise(2), num_inference_steps=4, generator=generators(0))
    given = roll(pipe, noise(2), timesteps=pipe.scheduler.timesteps.tolist(), generator=generators(0))
    assert torch.equal(by_default.frames, given.frames)


@pytest.mark.parametrize("scheduler", SINGLE_STEP)
def test_timesteps_are_not_shifted_whatever_the_scheduler(scheduler, caplog):
    pipe = latent_pipeline(scheduler=scheduler(shift=5.0))
    given = roll(pipe, noise(2), timesteps=[1000, 750, 500, 250], generator=generators(0))
    assert pipe.scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert "shift of 5.0" in caplog.text and "[1.0, 0.75, 0.5, 0.25]" in caplog.text
    unshifted = latent_pipeline(scheduler=scheduler(shift=1.0))
    assert torch.equal(roll(unshifted, noise(2), num_inference_steps=4, generator=generators(0)).frames, given.frames)


def test_chunk_partition_is_the_chunks():
    even = roll(latent_pipeline(), noise(2), num_frames_per_chunk=2)
    assert torch.equal(roll(latent_pipeline(), noise(2), chunk_partition=[2, 2, 2]).frames, even.frames)
    uneven = []
    roll(
        latent_pipeline(), noise(2), chunk_partition=[1, 3, 2], on_chunk=lambda i, x, d: uneven.append((i, x.shape[2]))
    )
    assert uneven == [(0, 1), (1, 3), (2, 2)]


# Settings of the checkpoint

SETTINGS = {
    "num_frames_per_chunk": 1,
    "window_size": 4,
    "num_sink_frames": 2,
    "relative_positions": True,
    "num_inference_steps": 3,
}


def test_settings_are_the_defaults_of_the_call():
    arguments = roll(latent_pipeline(), noise(3), **SETTINGS).frames
    settings = latent_pipeline(**SETTINGS)(prompt_embeds=embeds(), latents=noise(3), output_type="latent").frames
    assert torch.equal(settings, arguments)
    assert not torch.equal(roll(latent_pipeline(), noise(3), num_inference_steps=3).frames, arguments)
    for name, other in (("relative_positions", False), ("num_sink_frames", 0), ("window_size", 5)):
        changed = roll(latent_pipeline(**SETTINGS), noise(3), num_inference_steps=3, **{name: other}).frames
        assert not torch.equal(changed, arguments), name


WHOLE = {
    "method": {"tokentrim": {"drift_sensitivity": 0.0, "warmup_chunks": 1}},
    "layout": {"longlive": {"window_size": 6, "num_sink_frames": 1}},
    "prompt_transition": "recache",
}


def test_method_layout_and_transition_are_settings_too(tmp_path):
    """They are saved unchanged; arguments of a call override them."""
    latent_pipeline(**WHOLE).save_config(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: index[name] for name in WHOLE} == WHOLE
    settings = {name: index[name] for name in WHOLE}
    latents = steady_noise(6, [4])
    call = {"prompt_schedule": {0: embeds(), 3: embeds(seed=9)}, "prompt_embeds": None}
    loaded = roll(latent_pipeline(**settings), latents, **call)
    expected = roll(latent_pipeline(), latents, **call, **WHOLE)
    assert torch.equal(loaded.frames, expected.frames) and loaded.decisions == expected.decisions
    assert any(each["trim"] for each in loaded.decisions[0])
    for other in ({"method": "plain"}, {"layout": "longlive"}, {"prompt_transition": "keep"}):
        changed = roll(latent_pipeline(**settings), latents, **call, **other).frames
        assert torch.equal(changed, roll(latent_pipeline(), latents, **call, **WHOLE | other).frames)
        assert not torch.equal(changed, loaded.frames), other


@pytest.mark.parametrize(
    "setting",
    [{"method": ["tokentrim"]}, {"layout": Layout()}, {"prompt_transition": {20: "cut"}}],
    ids=["list", "object", "by chunk"],
)
def test_objects_are_not_saved_as_settings(setting):
    ((name, _),) = setting.items()
    with pytest.raises(TypeError, match=f"`{name}` must be a name, a number or a dict of settings, to travel"):
        latent_pipeline(**setting)


def test_stream_uses_the_checkpoints_transition():
    frames = []
    for settings, transition in ((WHOLE, None), (WHOLE, "keep"), ({**WHOLE, "prompt_transition": None}, "recache")):
        pipe = latent_pipeline(**settings)
        with pipe.stream(
            prompt_embeds=embeds(), latents=noise(5), output_type="latent", num_inference_steps=2
        ) as stream:
            for chunk in stream:
                if chunk.index == 2:
                    stream.set_prompt(embeds(seed=9), transition)
        frames.append(chunk.latents)
    assert torch.equal(frames[0], frames[2]) and not torch.equal(frames[0], frames[1])


@pytest.mark.parametrize("settings", [SETTINGS, WHOLE], ids=["window", "layout"])
def test_settings_survive_saving(settings, tmp_path):
    full_pipeline(**settings).save_pretrained(tmp_path)
    loaded = quiet(TokenTrimPipeline.from_pretrained(tmp_path))
    size = {"height": 32, "width": 48, "max_sequence_length": 8, "rollout": None}
    assert {name: loaded.config[name] for name in settings | size} == settings | size
    one, other = (
        pipe(PROMPT, num_frames=21, generator=generators(0)).frames for pipe in (loaded, full_pipeline(**settings))
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_components_of_a_wan_pipeline_work():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    stock = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        scheduler=scheduler,
        transformer=tiny_transformer(),
    )
    pipe = quiet(TokenTrimPipeline.from_pipe(stock))
    assert pipe.transformer is stock.transformer and pipe.scheduler.config.flow_shift == 3.0
    output = pipe(PROMPT, num_frames=9, height=32, width=48, max_sequence_length=8)
    assert output.frames.shape == (1, 9, 32, 48, 3)


@needs_accelerator
def test_model_cpu_offload():
    expected = full_pipeline()(PROMPT, num_frames=21, generator=generators(0)).frames
    pipe = full_pipeline()
    pipe.enable_model_cpu_offload()
    frames = pipe(PROMPT, num_frames=21, generator=generators(0)).frames
    np.testing.assert_allclose(frames, expected, atol=1e-3)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}


# Continuation


@pytest.mark.parametrize("drift_signal", ["final", "first_step"])
def test_latents_of_a_video_are_continued(drift_signal):
    """Given the first chunks of a rollout, the rest equals it bit for bit."""
    method = [SeverityMonitor(drift_signal)]
    whole = roll(latent_pipeline(), noise(5), method=method)
    called = []
    rest = roll(
        latent_pipeline(),
        noise(5),
        video_latents=whole.frames[:, :, : 2 * CHUNK].transpose(1, 2),
        method=method,
        on_chunk=lambda index, latents, decisions: called.append(index),
    )
    assert torch.equal(rest.frames, whole.frames)
    assert called == [2, 3, 4]
    severities = [decision["severity"] for decision in rest.decisions[0]]
    first = 2 if drift_signal == "final" else 3
    assert severities == [None] * first + [d["severity"] for d in whole.decisions[0][first:]]


def test_frames_of_a_video_are_continued():
    pipe, video = full_pipeline(), randn(1, 9, 3, 32, 48).sigmoid()
    settings = {"num_frames": 33, "output_type": "latent"}
    frames = pipe(PROMPT, video=video, generator=generators(0), **settings).frames
    encoded = pipe.encode_video(video, height=32, width=48)
    latents = pipe(PROMPT, video_latents=encoded, generator=generators(0), **settings).frames
    assert torch.equal(frames, latents)
    assert torch.equal(frames[:, :, :CHUNK].transpose(1, 2), encoded)


def frame_by_frame(**arguments):
    """A call on a VAE without temporal compression: one latent frame per frame."""
    pipe = latent_pipeline()
    pipe = quiet(TokenTrimPipeline(None, None, pipe.transformer, tiny_vae(temporal_factor=1), pipe.scheduler))
    size = {"height": 32, "width": 48, "num_inference_steps": 1}
    return pipe(prompt_embeds=embeds(), **size, **arguments).frames


def test_vae_without_temporal_compression():
    one, other = (frame_by_frame(num_frames=number, generator=torch.Generator().manual_seed(0)) for number in (6, 7))
    assert one.shape == (1, 6, 32, 48, 3) and other.shape == (1, 7, 32, 48, 3)
    assert (one == other[:, :6]).all() and one.std() > 0.01


def test_one_chunk_is_enough_to_continue_without_temporal_compression():
    videos = [
        frame_by_frame(num_frames=6, generator=torch.Generator().manual_seed(0), **given)
        for given in ({}, *({"video": randn(1, 3, 3, 32, 48, seed=seed).sigmoid()} for seed in (0, 1)))
    ]
    assert all(video.shape == (1, 6, 32, 48, 3) for video in videos)
    assert all((one != other).mean(axis=(0, 2, 3, 4)).all() for one, other in zip(videos, videos[1:]))


# Callbacks


def test_callback_sees_each_step_with_the_requested_tensors():
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append((step, timestep.item(), sorted(tensors)))
        return tensors

    pipe = latent_pipeline()
    roll(
        pipe,
        noise(2),
        num_inference_steps=2,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    steps = [(step, pipe.scheduler.timesteps[step].item(), ["latents", "prompt_embeds"]) for step in (0, 1)]
    assert calls == steps * 2 and pipe.num_timesteps == 4


def test_callback_may_change_latents():
    class Flatten(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipe, step, timestep, tensors):
            return {"latents": tensors["latents"] * 0 + 0.5}

    # At the last step of a chunk what the callback returns is the chunk; the next one starts from its own noise.
    frames = roll(latent_pipeline(), noise(2), callback_on_step_end=Flatten(cutoff_step_ratio=1.0)).frames
    assert torch.equal(frames, torch.full_like(frames, 0.5))


def test_callback_may_change_the_prompt():
    """From the context pass of the first chunk on, as if that chunk had been given with the new prompt."""
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append(step)
        new = {"prompt_embeds": embeds(seed=50), "negative_prompt_embeds": embeds(seed=51)}
        return new if len(calls) == 2 else {}

    settings = {"guidance_scale": 2.0, "method": "plain"}
    changed = roll(
        latent_pipeline(), noise(4), negative_prompt_embeds=embeds(seed=9), callback_on_step_end=callback, **settings
    ).frames
    expected = roll(
        latent_pipeline(),
        noise(4),
        prompt_embeds=embeds(seed=50),
        negative_prompt_embeds=embeds(seed=51),
        video_latents=changed[:, :, :CHUNK].transpose(1, 2),
        **settings,
    ).frames
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("output", ["returned", "in place"])
def test_callback_may_change_the_prompt_in_place(output):
    def callback(pipe, step, timestep, tensors):
        if output == "returned":
            return {"prompt_embeds": embeds(seed=50)}
        tensors["prompt_embeds"].copy_(embeds(seed=50))
        return {}

    given, inputs = embeds(), {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = roll(latent_pipeline(), noise(2), prompt_embeds=given, callback_on_step_end=callback, **inputs)
    assert torch.equal(given, embeds())  # the caller's own
    first, second = changed.frames.split(CHUNK, dim=2)
    again = roll(
        latent_pipeline(), noise(2), prompt_embeds=embeds(seed=50), video_latents=first.transpose(1, 2), method="plain"
    )
    assert torch.equal(again.frames[:, :, CHUNK:], second)


GUIDED = {"guidance_scale": 4.0, "negative_prompt_embeds": embeds(seed=9)}


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_ends_and_begins_again_in_a_callback(scale):
    """Off after the first step; from the second chunk on, the callback's value, as if the first chunk was given."""
    calls = []

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0 if not calls else scale
        calls.append(step)
        return {}

    output = roll(latent_pipeline(), noise(3), **GUIDED, callback_on_step_end=callback)
    first = output.frames[:, :, :CHUNK].transpose(1, 2)
    on = {**GUIDED, "guidance_scale": scale} if scale > 1 else {}
    expected = roll(latent_pipeline(), noise(3), video_latents=first, **on).frames
    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    negative = {**GUIDED, "negative_prompt_embeds": embeds(seed=10)}
    other = roll(latent_pipeline(), noise(3), **negative, callback_on_step_end=callback)  # `calls` is not empty now
    assert (other.frames - output.frames)[:, :, :CHUNK].abs().amax() > 1e-4  # the first step was guided


def test_diffusers_own_callback_ends_guidance():
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    output = roll(latent_pipeline(), noise(3), **GUIDED, callback_on_step_end=cutoff)
    first = output.frames[:, :, :CHUNK].transpose(1, 2)
    expected = roll(latent_pipeline(), noise(3), video_latents=first).frames
    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    pair = {**GUIDED, "negative_prompt_embeds": embeds(2, seed=9)}
    with pytest.raises(ValueError, match=r"`callback_on_step_end: prompt_embeds` must be of shape \(2, 8, 32\)"):
        roll(latent_pipeline(), noise(3, 2), **pair, callback_on_step_end=cutoff)


def test_regeneration_works_after_guidance_ended():
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {}

    negative = {**GUIDED, "negative_prompt_embeds": embeds(2, seed=9)}
    output = roll(latent_pipeline(), steady_noise(5, [9, 3]), **negative, callback_on_step_end=callback)
    assert [triggers(decisions) for decisions in output.decisions] == [[], [3]]


@pytest.mark.parametrize("layout", ["tame", "memrope"])
def test_layout_that_rewrites_memory_works_after_guidance_ended(layout):
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {}

    call = {"layout": layout, **GUIDED, "num_inference_steps": 1}
    ended = roll(latent_pipeline(), noise(6), **call, callback_on_step_end=callback).frames
    guided = roll(latent_pipeline(), noise(6), **call).frames
    assert torch.equal(ended[:, :, :CHUNK], guided[:, :, :CHUNK])  # it ends behind the only step of the first chunk
    assert (ended - guided)[:, :, CHUNK:].abs().max() > 1e-3 and ended.abs().max() < 100


@pytest.mark.parametrize(
    "returned, error, key",
    [
        ({"prompt_embeds": None}, TypeError, "prompt_embeds"),
        ({"prompt_embeds": "a red circle"}, TypeError, "prompt_embeds"),
        ({"prompt_embeds": embeds(2)}, ValueError, "prompt_embeds"),
        ({"prompt_embeds": embeds() * float("nan")}, ValueError, "prompt_embeds"),
        ({"promt_embeds": embeds()}, ValueError, "promt_embeds"),
        ({"negative_prompt_embeds": embeds()}, ValueError, "negative_prompt_embeds"),
        ({"latents": None}, TypeError, "latents"),
    ],
)
def test_what_a_callback_returns_is_checked(returned, error, key):
    with pytest.raises(error, match=f"callback_on_step_end.*{key}"):
        roll(latent_pipeline(), noise(2), callback_on_step_end=lambda *_: returned)


def test_guidance_that_begins_in_a_callback_raises():
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 4.0
        return {}

    with pytest.raises(ValueError, match="`guidance_scale`.* is 4.0"):
        roll(latent_pipeline(), noise(2), callback_on_step_end=callback)


def test_callback_of_a_regeneration_sees_only_its_videos():
    sizes = []

    def callback(pipe, step, timestep, tensors):
        sizes.append((len(tensors["latents"]), len(tensors["prompt_embeds"])))
        return tensors

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    watched = roll(latent_pipeline(), steady_noise(5, [9, 3]), callback_on_step_end=callback, **inputs)
    assert [triggers(decisions) for decisions in watched.decisions] == [[], [3]]
    assert sizes == [(2, 2)] * 2 * 4 + [(1, 2)] * 2 + [(2, 2)] * 2
    assert torch.equal(watched.frames, roll(latent_pipeline(), steady_noise(5, [9, 3])).frames)


def test_on_chunk_gets_copies():
    """Changes to its latents and decisions affect neither the output nor later chunks."""

    def spoil(index, latents, decisions):
        latents.fill_(7.0)
        for decision in decisions:
            decision["tokens"].append(99)
            decision.clear()

    expected = roll(latent_pipeline(), steady_noise(5, [3, 4]))
    output = roll(latent_pipeline(), steady_noise(5, [3, 4]), on_chunk=spoil)
    assert triggers(expected.decisions[0]) == [3]
    assert torch.equal(output.frames, expected.frames)
    assert output.decisions == expected.decisions


def test_on_chunk_is_called_once_for_each_accepted_chunk():
    calls = []
    output = roll(
        latent_pipeline(),
        steady_noise(5, [3, 4]),
        on_chunk=lambda *arguments: calls.append(arguments),
        max_regenerations=2,
    )
    assert triggers(output.decisions[0]) == [3]
    assert [index for index, _, _ in calls] == list(range(5))
    for index, latents, decisions in calls:
        assert torch.equal(latents, output.frames[:, :, index * CHUNK : (index + 1) * CHUNK])
        assert decisions == [video_decisions[index] for video_decisions in output.decisions]


def interrupter(at):
    """A callback that interrupts after a number of denoising steps."""

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = len(steps) == at
        return {}

    steps = []
    return callback


@pytest.mark.parametrize(
    "settings",
    [{"method": "plain"}, {"warmup_chunks": 4}, {"warmup_chunks": 4, "drift_signal": "first_step"}],
    ids=str,
)
@pytest.mark.parametrize("at", range(1, 9))
def test_interrupt_stops_at_once_and_drops_the_unfinished_chunk(at, settings):
    """After that many of the 2 x 4 steps. A chunk whose last step has run is not accepted yet, so it is dropped too."""
    pipe, forwards, called, latents = latent_pipeline(), [], [], noise(4, 2)
    before = processors(pipe.transformer)
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    output = roll(
        pipe,
        latents,
        callback_on_step_end=interrupter(at),
        on_chunk=lambda index, latents, decisions: called.append(index),
        **settings,
    )
    num_chunks = (at - 1) // 2
    assert len(forwards) == at + num_chunks  # and a context pass of each finished chunk
    assert called == list(range(num_chunks))
    expected = roll(latent_pipeline(), latents, **settings)
    assert output.frames.shape == (2, 4, num_chunks * CHUNK, *latents.shape[3:])
    assert torch.equal(output.frames, expected.frames[:, :, : num_chunks * CHUNK])
    assert output.decisions == [video_decisions[:num_chunks] for video_decisions in expected.decisions]
    assert processors(pipe.transformer) == before
    assert torch.equal(roll(pipe, latents, **settings).frames, expected.frames)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_frames_chunk_frames_and_decisions_agree_after_an_interrupt(at):
    output = full_pipeline()(PROMPT, num_frames=33, callback_on_step_end=interrupter(at), generator=generators(0))
    num_chunks = (at - 1) // 2
    assert output.chunk_frames == [9, 12, 12][:num_chunks]
    assert output.frames.shape == (1, sum(output.chunk_frames), 32, 48, 3)
    assert [len(video_decisions) for video_decisions in output.decisions] == [num_chunks]


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_interrupt_in_the_first_chunk_gives_videos_without_frames(output_type):
    output = full_pipeline()(PROMPT, num_frames=21, callback_on_step_end=interrupter(1), output_type=output_type)
    assert len(output.frames) == 1 and len(output.frames[0]) == 0
    assert output.chunk_frames == [] and output.decisions == [[]]


def test_interrupt_in_a_regeneration_drops_the_chunk():
    """Chunk 3 would be regenerated: its 2 steps are the 9th and 10th."""
    output = roll(latent_pipeline(), steady_noise(5, [3]), callback_on_step_end=interrupter(9))
    expected = roll(latent_pipeline(), steady_noise(5, [3]))
    assert triggers(expected.decisions[0]) == [3]
    assert torch.equal(output.frames, expected.frames[:, :, : 3 * CHUNK])
    assert output.decisions == [expected.decisions[0][:3]]


def test_interrupt_drops_the_chunks_in_flight():
    """Rolling Forcing with 3 steps: the third forward finishes the first chunk."""
    settings = {"rollout": "rolling_forcing", "num_inference_steps": 3, "window_size": 12}
    expected = roll(latent_pipeline(), noise(5), **settings)
    for at, num_chunks in ((2, 0), (3, 0), (4, 1), (6, 3)):
        output = roll(latent_pipeline(), noise(5), callback_on_step_end=interrupter(at), **settings)
        assert torch.equal(output.frames, expected.frames[:, :, : num_chunks * CHUNK])
        assert output.decisions == [expected.decisions[0][:num_chunks]]


def test_interrupt_keeps_given_chunks():
    given = noise(2, seed=5)
    output = roll(
        latent_pipeline(), noise(4), video_latents=given.transpose(1, 2), callback_on_step_end=interrupter(1)
    )
    assert torch.equal(output.frames, given) and len(output.decisions[0]) == 2


def test_interrupt_between_chunks_adds_no_chunk():
    def on_chunk(index, latents, decisions):
        pipe._interrupt = index == 1

    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    output = roll(pipe, noise(4), on_chunk=on_chunk)
    assert len(forwards) == 2 * 3
    assert torch.equal(output.frames, roll(latent_pipeline(), noise(4)).frames[:, :, : 2 * CHUNK])
    assert len(output.decisions[0]) == 2


@pytest.mark.parametrize("settings", [{"method": "plain"}, {}, {"drift_signal": "first_step"}], ids=str)
def test_progress_bar_ends_full(settings, capfd):
    pipe = latent_pipeline()
    pipe.set_progress_bar_config(disable=False)
    roll(pipe, steady_noise(5, [3]), **settings)
    done, total = re.findall(r"(\d+)/(\d+)", capfd.readouterr().err)[-1]
    assert done == total and int(total) >= 10
    pipe.set_progress_bar_config(disable=True)
    roll(pipe, noise(2))
    assert not capfd.readouterr().err


# After an error


def fail_in_the_transformer(pipe, error):
    def hook(*_):
        count.append(1)
        if len(count) == 7:
            raise error

    count = []
    handle = pipe.transformer.blocks[1].register_forward_hook(hook)
    try:
        roll(pipe, noise(4))
    finally:
        handle.remove()


def fail_in_the_context_pass(pipe, error):
    def hook(module, args, kwargs):
        if kwargs["timestep"].max() == 0:
            raise error

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        roll(pipe, noise(4))
    finally:
        handle.remove()


def fail_in_a_callback(pipe, error):
    def callback(pipe, step, timestep, tensors):
        raise error

    roll(pipe, noise(4), callback_on_step_end=callback)


def fail_in_on_chunk(pipe, error):
    def on_chunk(index, latents, decisions):
        if index == 2:
            raise error

    roll(pipe, steady_noise(4, [2]), on_chunk=on_chunk)


def fail_in_renoise(pipe, error):
    def renoise(chunk, step):
        if chunk == 1:
            raise error
        return noise(1)

    roll(pipe, noise(4), renoise=renoise)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "fail",
    [fail_in_the_transformer, fail_in_the_context_pass, fail_in_a_callback, fail_in_on_chunk, fail_in_renoise],
)
def test_call_after_an_error_equals_a_first_call(fail, error):
    pipe = latent_pipeline(scheduler=FlowMatchLCMScheduler(shift=5.0))
    before = processors(pipe.transformer)
    with pytest.raises(error):
        fail(pipe, error)
    assert processors(pipe.transformer) == before
    fresh = latent_pipeline(scheduler=FlowMatchLCMScheduler(shift=5.0))
    again = (roll(each, noise(4), generator=generators(0)).frames for each in (pipe, fresh))
    assert torch.equal(*again)


@pytest.mark.parametrize("forward, place", [(0, "chunk 0, step 0"), (2, "chunk 0, .*context"), (4, "chunk 1, step 1")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_model_output_that_is_not_finite_raises(forward, place, value):
    pipe, forwards = latent_pipeline(), []
    before = processors(pipe.transformer)

    def poison(module, args, output):
        forwards.append(1)
        if len(forwards) == forward + 1:
            output[..., 0, 0] = value

    handle = pipe.transformer.proj_out.register_forward_hook(poison)
    with pytest.raises(RuntimeError, match=place):
        roll(pipe, noise(4))
    handle.remove()
    assert processors(pipe.transformer) == before
    assert torch.equal(roll(pipe, noise(4)).frames, roll(latent_pipeline(), noise(4)).frames)


def test_call_leaves_nothing_behind():
    pipe = full_pipeline()
    before = processors(pipe.transformer)
    pipe(PROMPT, num_frames=21)
    assert processors(pipe.transformer) == before
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is RollingKVCache]
