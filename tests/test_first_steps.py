"""The first generated chunk with other steps than the rest, as Causal Forcing++ takes them."""

import pytest
import torch
from builders import CHUNK, embeds, full_pipeline, generators, latent_pipeline, noise, roll
from diffusers import FlowMatchLCMScheduler

from tokentrim.tools.jobs import check_settings


STEPS = {"first": 4, "rest": 2}
PROMPT = "a red circle moving right over a blue background"


def given(latents):
    """Latents (B, C, T, H, W) as frames to continue."""
    return latents.permute(0, 2, 1, 3, 4)


@pytest.mark.parametrize("method", ["plain", {"tokentrim": {"drift_sensitivity": 0.0, "warmup_chunks": 1}}], ids=str)
def test_first_chunk_and_rest_are_those_of_two_calls(method):
    latents, counted = noise(4), []
    call = {"method": method, "window_size": 9}
    mixed = roll(
        latent_pipeline(),
        latents,
        num_inference_steps=STEPS,
        callback_on_step_end=lambda pipe, step, timestep, tensors: counted.append(step) or {},
        **call,
    )
    first = roll(latent_pipeline(), latents, num_inference_steps=4, **call).frames[:, :, :CHUNK]
    assert mixed.frames[:, :, :CHUNK].equal(first)
    assert counted[:6] == [0, 1, 2, 3, 0, 1] and set(counted[4:]) == {0, 1}
    if method == "plain":
        assert len(counted) == 4 + 3 * 2
        rest = roll(latent_pipeline(), latents, num_inference_steps=2, video_latents=given(first), **call).frames
        assert mixed.frames.equal(rest)


def test_the_first_generated_chunk_takes_them_behind_given_frames():
    latents, before = noise(4), given(noise(1, seed=5))
    mixed = roll(latent_pipeline(), latents, num_inference_steps=STEPS, video_latents=before, method="plain").frames
    four, two = (
        roll(latent_pipeline(), latents, num_inference_steps=steps, video_latents=before, method="plain").frames
        for steps in (4, 2)
    )
    second = slice(CHUNK, 2 * CHUNK)
    assert mixed[:, :, second].equal(four[:, :, second]) and not mixed[:, :, second].equal(two[:, :, second])


@pytest.mark.parametrize("cut_at", [1, 2])
def test_a_resumed_run_takes_the_same_steps(cut_at, tmp_path):
    call = {"num_frames": 45, "window_size": 9, "num_inference_steps": STEPS, "output_type": "latent"}

    def start(**others):
        pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0))
        return pipe.stream(PROMPT, generator=generators(0)[0], **call, **others)

    expected = [chunk.latents for chunk in start()]
    with start(state_dir=tmp_path, save_every=1) as stream:
        begin = [next(stream).latents for _ in range(cut_at)]
        stream.save_state()
    with full_pipeline(FlowMatchLCMScheduler(shift=5.0)).resume(tmp_path) as stream:
        rest = [chunk.latents for chunk in stream]
    assert all(map(torch.equal, [*begin, *rest], expected))


def test_steps_travel_with_a_checkpoint(tmp_path):
    pipe = full_pipeline(num_inference_steps=STEPS)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert loaded.config.num_inference_steps == STEPS
    plan = loaded.plan(PROMPT, num_frames=45)
    assert (plan.schedule.num_inference_steps, plan.schedule.first_steps) == (2, 4)
    assert plan.count_steps(2) == 4 + 3 * 2 and plan.count_steps(2, 1) == 3 * 2
    assert loaded.plan(PROMPT, num_frames=45, sigmas=[1.0, 0.5, 0.2]).schedule.first_steps is None
    check_settings({"num_inference_steps": STEPS})


@pytest.mark.parametrize(
    "steps, error, message",
    [
        ({"first": 4}, ValueError, "`num_inference_steps` must be an int or a dict such as"),
        ({"first": 4, "rest": 0}, ValueError, "`num_inference_steps: rest` must be an int from 1 to"),
        ({"first": 2.5, "rest": 2}, TypeError, "`num_inference_steps: first` must be an int from 1 to"),
        ([4, 2], TypeError, "`num_inference_steps` must be an int from 1 to 10000 or a dict of two"),
        (0, ValueError, "`num_inference_steps` must be an int from 1 to 10000 or a dict of two"),
    ],
    ids=str,
)
def test_invalid_steps_are_named(steps, error, message):
    with pytest.raises(error, match=message):
        roll(latent_pipeline(), noise(2), num_inference_steps=steps)


def test_rolling_forcing_refuses_other_first_steps():
    with pytest.raises(ValueError, match="`num_inference_steps` must be an int for rollout='rolling_forcing'"):
        roll(latent_pipeline(), noise(2), num_inference_steps=STEPS, rollout="rolling_forcing", prompt_embeds=embeds())
