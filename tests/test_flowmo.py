"""FlowMo's objective against the paper's formulas written out, and its gradient steps on a real transformer."""

import re

import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    GRID,
    HEIGHT,
    WIDTH,
    begin_pass,
    embeds,
    latent_pipeline,
    noise,
    processors,
    randn,
    roll,
    steady_noise,
    tiny_transformer,
    triggers,
)

from tokentrim import RollingKVCache
from tokentrim.tokentrim_backbones.attention import cached_attention
from tokentrim.tokentrim_backbones.wan import rotary_dims
from tokentrim.tokentrim_policies.flowmo import checkpointed, guide, motion_variance


SIGMA = 0.9
ITERATIONS, LEARNING_RATE = 5, 0.005


class X0:
    """The x0 prediction of a transformer, x_t - sigma * flow; it records the motion variances."""

    def __init__(self, transformer, text):
        self.transformer = transformer
        self.text = text
        self.variances = []

    def __call__(self, latents):
        timestep = torch.full((len(latents),), 1000 * SIGMA)
        flow = self.transformer(latents.to(self.transformer.dtype), timestep, self.text, return_dict=False)[0]
        x0 = (latents.double() - SIGMA * flow.double()).to(latents.dtype)
        self.variances.append(motion_variance(x0).detach())
        return x0


def guided(latents, transformer=None, text=None, iterations=ITERATIONS):
    predict_x0 = X0(transformer or tiny_transformer(), embeds(len(latents)) if text is None else text)
    return guide(latents, predict_x0, iterations, LEARNING_RATE)


def motion_variance_of(video):
    """Equations 2, 3, 7 and 8 as loops over one video, (C, T, H, W)."""
    channels, frames, height, width = video.shape
    worst = 0.0
    for y in range(height):
        for x in range(width):
            total = 0.0
            for channel in range(channels):
                values = video[channel, :, y, x].tolist()
                motion = [abs(later - sooner) for sooner, later in zip(values, values[1:])]
                mean = sum(motion) / len(motion)
                total += sum((each - mean) ** 2 for each in motion) / len(motion)
            worst = max(worst, total / channels)
    return worst


# The objective


@pytest.mark.parametrize("num_frames", [3, 4, 7])
def test_motion_variance_equals_the_slow_way(num_frames):
    videos = randn(2, CHANNELS, num_frames, HEIGHT, WIDTH, seed=num_frames)
    expected = [motion_variance_of(video) for video in videos]
    assert motion_variance(videos).tolist() == pytest.approx(expected, rel=1e-5)


def test_three_frames_give_two_motions():
    first, second, third = randn(3, 1, CHANNELS, 1, 1)
    expected = (((third - second).abs() - (second - first).abs()) ** 2 / 4).mean()
    torch.testing.assert_close(motion_variance(torch.stack([first, second, third], dim=2)), expected[None])


def test_still_and_even_motion_are_at_zero():
    start, velocity = randn(2, 2, CHANNELS, 1, HEIGHT, WIDTH)
    time = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert motion_variance(start.expand(-1, -1, 5, -1, -1)).tolist() == [0, 0]
    assert motion_variance(start + time * velocity).max() < 1e-10
    assert motion_variance(start + time % 2 * velocity).max() < 1e-10  # the distance has no direction (eq. 2)
    assert motion_variance(start + time**2 * velocity).min() > 0.1


def test_motion_variance_uses_the_most_uneven_patch():
    video = torch.zeros(1, CHANNELS, 3, HEIGHT, WIDTH)
    video[:, :, 2, 0, 0] = 2.0  # motions 0 and 2: variance 1
    video[:, :, 2, 2:4, 2:4] = 1.6  # motions 0 and 1.6: variance 0.64
    assert motion_variance(video).item() == pytest.approx(1)
    assert motion_variance(0 * video).item() == 0


def test_motion_variance_of_half_precision_is_fp32():
    video = randn(2, CHANNELS, 3, HEIGHT, WIDTH).bfloat16()
    torch.testing.assert_close(motion_variance(video), motion_variance(video.float()), rtol=0, atol=0)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_motion_does_not_vary_in_fewer_than_three_frames(num_frames):
    with pytest.raises(ValueError, match=f"at least 3 latent frames, but there are {num_frames}"):
        motion_variance(randn(1, CHANNELS, num_frames, HEIGHT, WIDTH))


# The guidance step


@pytest.mark.parametrize("seed", range(4))
def test_guidance_lowers_the_motion_variance(seed):
    predict_x0 = X0(tiny_transformer(seed), embeds(2, seed=seed))
    latents = noise(1, 2, seed=seed)
    with torch.no_grad():
        predict_x0(guide(latents, predict_x0, 8, LEARNING_RATE))
    variances = torch.stack(predict_x0.variances)  # before each of the 8 steps, and after the last
    assert variances.shape == (9, 2)
    assert (variances.diff(dim=0) < 0).all()
    assert (variances[-1] < 0.95 * variances[0]).all()


def test_first_step_equals_adam():
    """Adam's first step is eta times the signs of the gradient."""
    latents, text, transformer = noise(1), embeds(), tiny_transformer()
    leaf = latents.clone().requires_grad_()
    gradient = torch.autograd.grad(motion_variance(X0(transformer, text)(leaf)).sum(), leaf)[0]
    expected = latents - LEARNING_RATE * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(guided(latents, transformer, text, 1), expected, atol=1e-6, rtol=0)


def test_batch_equals_single_runs():
    latents, text, transformer = noise(1, 3), embeds(3), tiny_transformer()
    batch = guided(latents, transformer, text)
    for video in range(3):
        single = guided(latents[video : video + 1], transformer, text[video : video + 1])
        torch.testing.assert_close(batch[video : video + 1], single, atol=1e-4, rtol=0)


def test_no_iterations_return_the_latents_themselves():
    latents = noise(1)
    assert guide(latents, None, 0, LEARNING_RATE) is latents


def test_guidance_leaves_only_the_guided_latents():
    transformer, latents = tiny_transformer().requires_grad_(True), noise(1)
    weights = {name: weight.clone() for name, weight in transformer.named_parameters()}
    given = latents.clone()
    with torch.no_grad():
        result = guided(latents, transformer)
        assert not torch.is_grad_enabled()
    assert torch.equal(latents, given) and not torch.equal(result, given)
    assert result.grad_fn is None and not result.requires_grad and not latents.requires_grad
    for name, weight in transformer.named_parameters():
        assert torch.equal(weight, weights[name]) and weight.grad is None


def test_bf16_latents_and_weights():
    transformer, latents = tiny_transformer().to(torch.bfloat16), noise(1).bfloat16()
    predict_x0 = X0(transformer, embeds().bfloat16())
    result = guide(latents, predict_x0, ITERATIONS, 0.05)
    predict_x0(result)
    assert result.dtype == torch.bfloat16
    assert predict_x0.variances[-1] < predict_x0.variances[0]


def test_steps_too_small_for_bf16_add_up():
    """The steps are summed in fp32 and rounded once."""
    latents = torch.full((1, 1, 3, 1, 1), 4.0, dtype=torch.bfloat16)  # whose neighbours are 2^-5 away
    push = torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 3, 1, 1)
    result = guide(latents, lambda latents: (latents.float() + 8) * push, 10, 0.005)
    assert (result[:, :, 2] < latents[:, :, 2]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_raises(value):
    with pytest.raises(RuntimeError, match="gradient is not finite .* in iteration 0"):
        guide(noise(1), lambda latents: latents * value, 1, LEARNING_RATE)


def test_inference_mode_raises():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="torch.no_grad"):
        guide(noise(1), lambda latents: latents, 1, LEARNING_RATE)


# Gradient checkpointing


def saved_bytes(function):
    """Bytes that autograd stores for the backward pass of `function`, each tensor once."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_checkpointed_gradients_are_the_same_and_stores_less():
    latents, transformer = noise(1), tiny_transformer()
    expected = guided(latents, transformer)
    leaf = latents.clone().requires_grad_()
    stored = saved_bytes(lambda: X0(transformer, embeds())(leaf))
    with checkpointed(transformer):
        assert torch.equal(guided(latents, transformer), expected)
        assert saved_bytes(lambda: X0(transformer, embeds())(leaf)) < stored / 3


@pytest.mark.parametrize("num_past", [0, 1])
@pytest.mark.parametrize("videos", [[0, 1], [1]])
def test_checkpointed_gradients_through_the_cache_are_the_same(videos, num_past):
    """The past must not change while blocks are recomputed; the first forward may project the prompt."""
    transformer, text, latents = tiny_transformer().requires_grad_(True), embeds(2), noise(1, 2)[videos]

    def result():
        cache = RollingKVCache(GRID, rotary_dims(transformer), 2)
        with torch.no_grad(), cached_attention(transformer, cache):
            for past in range(num_past):
                begin_pass(cache, 3, "commit")
                with cache.writing():
                    transformer(noise(1, 2, 5 + past), torch.zeros(2), text)
                cache.evict({0: [1, 2]})
            begin_pass(cache, 3)
            with cache.only(videos):
                result = guided(latents, transformer, text[videos])
        return result

    expected = result()
    with checkpointed(transformer):
        torch.testing.assert_close(result(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("enabled", [False, True])
def test_checkpointed_restores_the_transformer(enabled):
    transformer = tiny_transformer()
    transformer.proj_out.requires_grad_(True)
    if enabled:
        transformer.enable_gradient_checkpointing()
    function = transformer._gradient_checkpointing_func
    with pytest.raises(KeyError), checkpointed(transformer):
        assert transformer.is_gradient_checkpointing
        assert not any(parameter.requires_grad for parameter in transformer.parameters())
        raise KeyError
    assert transformer.is_gradient_checkpointing == enabled
    assert not enabled or transformer._gradient_checkpointing_func is function
    trained = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert trained == ["proj_out.weight", "proj_out.bias"]


# In the pipeline

ROLLOUTS = {
    "self_forcing": {},
    "first_step": {"drift_signal": "first_step"},
    "rolling_forcing": {"rollout": "rolling_forcing"},
    "guided by a negative prompt": {"guidance_scale": 2.0, "negative_prompt_embeds": embeds(2, seed=8)},
}
every_rollout = pytest.mark.parametrize("settings", ROLLOUTS.values(), ids=ROLLOUTS)
STRONG = {"iterations": 5, "learning_rate": 0.02}


def flowmo(trim=None, **settings):
    """The argument `method`: FlowMo before TokenTrim."""
    return {"flowmo": settings, "tokentrim": {} if trim is None else trim}


def chunk_variances(latents):
    """The objective of each chunk, (chunks, B)."""
    return torch.stack([motion_variance(chunk) for chunk in latents.split(CHUNK, dim=2)])


@every_rollout
def test_the_first_chunk_moves_more_evenly(settings):
    pipe = latent_pipeline()
    pipe.transformer.requires_grad_(True)
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    unguided, guided = (
        roll(pipe, noise(3, 2), method=method, **settings).frames for method in ("tokentrim", flowmo(**STRONG))
    )
    assert (chunk_variances(guided)[0] < 0.95 * chunk_variances(unguided)[0]).all()
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.transformer.parameters())
    assert not pipe.transformer.is_gradient_checkpointing and not guided.requires_grad


@every_rollout
def test_zero_iterations_change_no_bit(settings):
    unguided, off = (
        roll(latent_pipeline(), noise(3, 2), method=method, **settings).frames
        for method in ("tokentrim", flowmo(iterations=0, chunks="all", learning_rate=1.0))
    )
    assert torch.equal(unguided, off)


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_guides_every_chunk_on_request(rollout):
    unguided, first, every = (
        chunk_variances(roll(latent_pipeline(), noise(4, 2), rollout=rollout, method=method).frames)
        for method in ("tokentrim", flowmo(**STRONG), flowmo(**STRONG, chunks="all"))
    )
    assert rollout == "rolling_forcing" or torch.equal(first[0], every[0])
    assert every[1:].mean() < 0.95 * first[1:].mean() and every[1:].mean() < 0.95 * unguided[1:].mean()


def test_guides_only_the_given_steps():
    pipe = latent_pipeline()
    output = [
        roll(pipe, noise(1), num_inference_steps=5, method=flowmo(steps=steps)).frames
        for steps in (None, [0, 1], [0], [4], [], [7])
    ]
    plain = roll(pipe, noise(1), num_inference_steps=5).frames
    paper = roll(pipe, noise(1), num_inference_steps=5, method="paper").frames
    assert torch.equal(output[0], output[1])  # the first quarter of five steps, rounded up
    assert torch.equal(output[0], paper)
    assert torch.equal(output[4], plain) and torch.equal(output[5], plain)
    assert len({tuple(each.flatten().tolist()) for each in output}) == 4


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_trimming_on_top_of_flowmo_in_a_batch_equals_single_runs(rollout):
    settings = {"method": flowmo({"drift_sensitivity": 1.0}, **STRONG, chunks="all"), "rollout": rollout}
    latents, text = steady_noise(7, [3, 4]), embeds(2)
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings)
    for video in range(2):
        single = roll(latent_pipeline(), latents[video : video + 1], prompt_embeds=text[video : video + 1], **settings)
        torch.testing.assert_close(batch.frames[video], single.frames[0], atol=1e-3, rtol=0)
        assert triggers(batch.decisions[video]) == triggers(single.decisions[0]) != []


@pytest.mark.parametrize(
    ("settings", "name", "arguments"),
    [
        ({"iterations": -1}, "method['flowmo']: `iterations`", {}),
        ({"iterations": 1}, "`flowmo: iterations`", {"chunk_partition": [2, 4]}),
        ({"learning_rate": 0.0}, "method['flowmo']: `learning_rate`", {}),
        ({"learning_rate": float("nan")}, "method['flowmo']: `learning_rate`", {}),
        ({"steps": [-1]}, "method['flowmo']: `steps`", {}),
        ({"chunks": "last"}, "method['flowmo']: `chunks`", {}),
        ({"chunks": "all"}, "`flowmo: chunks`", {"drift_signal": "first_step"}),
    ],
)
def test_bad_input_raises(settings, name, arguments):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be")):
        roll(latent_pipeline(), noise(2), method=flowmo(**settings), **arguments)


def test_failing_guidance_leaves_nothing():
    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    with pytest.raises(RuntimeError, match="not finite"):
        pipe.transformer.proj_out.bias.fill_(float("inf"))
        roll(pipe, noise(2), method="paper")
    assert processors(pipe.transformer) == before
    assert not pipe.transformer.is_gradient_checkpointing
