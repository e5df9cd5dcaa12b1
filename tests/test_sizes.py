"""Square, vertical and wide videos: every rollout and every layout, and sizes that no patch fits."""

import pytest
import torch
from builders import CHANNELS, CHUNK, embeds, full_pipeline, generators, latent_pipeline, randn, roll, tiny_transformer
from oracle import oracle_rolling, oracle_rollout
from test_far import compare

from tokentrim import LAYOUTS


SHAPES = {"square": (6, 6), "vertical": (8, 4), "wide": (4, 10)}  # latents
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
EAGER = {"drift_sensitivity": 0.0, "prune_fraction": 0.3, "warmup_chunks": 1}
SIGMAS = [1.0, 5 * 2 / 3 / (1 + 4 * 2 / 3), 5 / 3 / (1 + 4 / 3)]  # 3 steps, shift 5
PROMPT = "a red circle moving right over a blue background"


def jumping_noise(shape, num_chunks=5, jump=3):
    """Nearly the same noise in every chunk, except for a corner that jumps once."""
    noise = randn(1, CHANNELS, CHUNK, *shape).repeat(1, 1, num_chunks, 1, 1)
    noise = noise + 0.05 * randn(1, CHANNELS, num_chunks * CHUNK, *shape, seed=1)
    noise[:, :, jump * CHUNK : (jump + 1) * CHUNK, :2, :2] += 6
    return noise


@every_shape
@pytest.mark.parametrize("window", [{}, {"window_size": 9, "num_sink_frames": 3}], ids=str)
def test_self_forcing_equals_masked_forwards(shape, window):
    transformer, latents = tiny_transformer(), jumping_noise(shape)
    output = roll(latent_pipeline(transformer), latents, num_inference_steps=3, **EAGER, **window)
    chunks = latents.split(CHUNK, dim=2)
    expected, attempts = oracle_rollout(transformer, chunks, embeds(), SIGMAS, **EAGER, **window)
    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    assert [decision["trim"] for decision in output.decisions[0]] == [len(tried) > 1 for tried in attempts]
    assert any(len(tried) > 1 for tried in attempts) and output.grid == (shape[0] // 2, shape[1] // 2)


@every_shape
def test_rolling_forcing_equals_masked_forwards(shape):
    transformer, latents = tiny_transformer(), jumping_noise(shape)
    settings = {"window_size": 15, **EAGER}
    output = roll(latent_pipeline(transformer), latents, num_inference_steps=3, rollout="rolling_forcing", **settings)
    expected, attempts = oracle_rolling(transformer, latents.split(CHUNK, dim=2), embeds(), SIGMAS, **settings)
    torch.testing.assert_close(output.frames, expected, atol=2e-5, rtol=0)
    assert [decision["trim"] for decision in output.decisions[0]] == [len(tried) > 1 for tried in attempts]


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 160)], ids=SHAPES)
def test_far_equals_upstream(size):
    compare(height=size[0], width=size[1])


LABELS = [[0, 1], [1, 0]]  # of each layer's heads
BY_HEAD = {
    "pyramid": {"pyramid": {"labels": LABELS}},
    "by_head": {"by_head": {"labels": LABELS, "layouts": ["longlive", "strided"]}},
}


@every_shape
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_batch_in_every_layout_equals_single_videos(layout, shape):
    latents = torch.cat([jumping_noise(shape, 6, jump) for jump in (3, 4)])
    prompts = embeds(2)
    call = {"layout": BY_HEAD.get(layout, layout), "method": "plain"}
    both = roll(latent_pipeline(), latents, prompt_embeds=prompts, **call).frames
    for video in range(2):
        single = roll(latent_pipeline(), latents[video][None], prompt_embeds=prompts[video][None], **call).frames
        torch.testing.assert_close(both[video][None], single, atol=1e-5, rtol=0)


@every_shape
def test_frames_have_the_size_and_a_stream_the_bits_of_a_call(shape):
    height, width = (8 * side for side in shape)
    call = {"height": height, "width": width, "num_frames": 21, "method": "tokentrim_plus"}
    frames = full_pipeline()(PROMPT, generator=generators(0), **call).frames
    assert frames.shape == (1, 21, height, width, 3)
    with full_pipeline().stream(PROMPT, generator=generators(0), **call) as stream:
        streamed = [chunk.frames for chunk in stream]
    assert sum(each.shape[1] for each in streamed) == 21
    start = 0
    for each in streamed:
        assert (frames[:, start : start + each.shape[1]] == each).all()
        start += each.shape[1]


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("side", [24, 40, 31, 33, 8, 0, -16, 16.0, True])
def test_a_size_that_no_patch_fits_is_named(name, side):
    with pytest.raises(
        (TypeError, ValueError), match=rf"`{name}` must be (a multiple of 16|an int >= 1), but is {side}"
    ):
        full_pipeline()(PROMPT, num_frames=9, output_type="latent", **{name: side})


@pytest.mark.parametrize("shape", [(5, 6), (6, 5)], ids=str)
def test_latents_that_no_patch_fits_are_named(shape):
    with pytest.raises(ValueError, match=r"`latents` must be .* multiples of \(2, 2\), .*but is of shape"):
        roll(latent_pipeline(), randn(1, CHANNELS, 2 * CHUNK, *shape))
