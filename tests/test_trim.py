"""Effects of trimming on a rollout, the parts that it must not change, and independence of the videos of a batch."""

import json

import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    GRID,
    HEIGHT,
    NUM_TOKENS,
    WIDTH,
    embeds,
    full_pipeline,
    generators,
    latent_pipeline,
    noise,
    randn,
    roll,
    steady_noise,
    tiny_transformer,
    triggers,
)
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from tokentrim import ContextPolicy, RollingKVCache, lift_scheduler
from tokentrim.tokentrim_backbones.attention import cached_attention
from tokentrim.tokentrim_backbones.wan import rotary_dims
from tokentrim.tokentrim_policies.trim import SeverityMonitor
from tokentrim.tokentrim_views.layout import Pass


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SCHEDULERS = {
    "FlowMapEuler": lambda: FlowMapEulerDiscreteScheduler(shift=5.0),
    "FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "LCM": lambda: FlowMatchLCMScheduler(shift=5.0),
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=5.0),
    "sde-DPM++": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
}
every_scheduler = pytest.mark.parametrize("stock", SCHEDULERS.values(), ids=SCHEDULERS)
both_signals = pytest.mark.parametrize("drift_signal", ["final", "first_step"])


def eager(**settings):
    """TokenTrim that trims at the smallest drift."""
    return {"tokentrim": {"drift_sensitivity": 0.0, **settings}}


def same_draws(seed=5):
    """Re-noising draws that are nearly equal in every chunk, so that drift comes from the context."""
    return lambda chunk, step: randn(1, CHANNELS, CHUNK, HEIGHT, WIDTH, seed=seed + step)


@every_scheduler
@both_signals
def test_a_gate_that_never_triggers_changes_no_bit(stock, drift_signal):
    shut, *others = (
        roll(
            latent_pipeline(scheduler=stock()),
            steady_noise(5, [3, 4]),
            generator=torch.Generator().manual_seed(0),
            method=method,
        )
        for method in (
            [SeverityMonitor(drift_signal)],
            {"tokentrim": {"drift_signal": drift_signal, "drift_sensitivity": 1e6}},
            eager(drift_signal=drift_signal, warmup_chunks=5),
            eager(drift_signal=drift_signal, max_regenerations=0),
        )
    )
    for other in others:
        assert torch.equal(shut.frames, other.frames)
        assert not triggers(other.decisions[0]) and not triggers(other.decisions[1])
        for ours, theirs in zip(shut.decisions, other.decisions):
            assert [d["severity"] for d in ours] == [d["severity"] for d in theirs]


def by_hand(transformer, stock, latents, text, decisions, generator, num_steps):
    """Every chunk is a fresh scheduler's only trajectory, on a context that was pruned before it began."""
    cache = RollingKVCache(GRID, rotary_dims(transformer), 1)
    chunks = []

    def forward(sample, timestep):
        return transformer(sample, timestep.float().expand(1), text, return_dict=False)[0]

    with torch.no_grad(), cached_attention(transformer, cache):
        for sample, decision in zip(latents.split(CHUNK, dim=2), decisions):
            cache.make_room(CHUNK)
            cache.evict({0: decision["tokens"]})
            cache.begin_pass(CHUNK, Pass())
            scheduler = lift_scheduler(stock())
            scheduler.set_rollout_timesteps(num_steps)
            scheduler.begin_chunk(generator)
            for step, timestep in enumerate(scheduler.timesteps):
                renoise = scheduler.renoises and step + 1 < num_steps
                eps = torch.randn(sample.shape, generator=generator[0]) if renoise else None
                sample = scheduler.step(forward(sample, timestep), timestep, sample, eps, return_dict=False)[0]
            cache.begin_pass(CHUNK, Pass("commit"))
            with cache.writing():
                forward(sample, torch.zeros(()))
            chunks.append(sample)
    return torch.cat(chunks, dim=2)


@every_scheduler
@both_signals
def test_regeneration_equals_a_fresh_trajectory_on_the_pruned_context(stock, drift_signal):
    """Bit for bit, up to the last chunk: pruned tokens stay pruned."""
    transformer, latents = tiny_transformer(), noise(9, seed=3)
    output = roll(
        latent_pipeline(transformer, stock()),
        latents,
        generator=generators(13),
        num_inference_steps=3,
        drift_sensitivity=0.0,
        drift_signal=drift_signal,
        prune_fraction=0.4,
    )
    decisions = output.decisions[0]
    assert triggers(decisions)[0] < 7
    draws = generators(13)
    if lift_scheduler(stock()).draws_inside:  # a solver does not share the noise's generator
        draws = generators(torch.randint(2**62, (1,), generator=draws[0]).item())
    expected = by_hand(transformer, stock, latents, embeds(), decisions, draws, 3)
    assert torch.equal(output.frames, expected)


@every_scheduler
@both_signals
def test_trimmed_and_plain_differ_from_the_first_trigger_on(stock, drift_signal):
    plain, trimmed = (
        roll(
            latent_pipeline(scheduler=stock()),
            noise(9, seed=3),
            generator=torch.Generator().manual_seed(0),
            method=method,
        )
        for method in ([SeverityMonitor(drift_signal)], eager(drift_signal=drift_signal))
    )
    first = triggers(trimmed.decisions[0])[0] * CHUNK
    assert torch.equal(plain.frames[:, :, :first], trimmed.frames[:, :, :first])
    assert not torch.equal(plain.frames[:, :, first : first + CHUNK], trimmed.frames[:, :, first : first + CHUNK])


@both_signals
def test_outlier_triggers_at_its_chunk(drift_signal):
    """With the paper's settings; token 0 of the grid is the corner that jumps."""
    output = roll(latent_pipeline(), steady_noise(6, [4]), drift_signal=drift_signal)
    decisions = output.decisions[0]
    assert triggers(decisions) == [4]
    assert decisions[4]["tokens"] == [0]
    assert decisions[4]["severity"] > decisions[4]["threshold"]


def test_second_attempt_removes_a_defect_of_the_first():
    def spoil_first_attempt(pipe, step, timestep, tensors):
        if step == 1 and len(steps) == 2 * 4 + 1:
            tensors["latents"][..., :2, :2] += 9
        steps.append(step)
        return tensors

    steps, latents = [], steady_noise(6, [9])
    output = roll(latent_pipeline(), latents, callback_on_step_end=spoil_first_attempt)
    decision = output.decisions[0][4]
    assert triggers(output.decisions[0]) == [4] and decision["tokens"] == [0]
    assert decision["severity"] > 15 > decision["threshold"] > decision["regenerated_severity"]
    unspoilt = roll(latent_pipeline(), latents, method="plain").frames
    assert (output.frames - unspoilt).abs().max() < 1


@both_signals
@pytest.mark.parametrize("max_regenerations", [0, 1, 2])
def test_cost_of_a_rollout_in_forwards(max_regenerations, drift_signal):
    """S steps for each chunk, a context pass for each but the last, and S or 1 for each regeneration."""
    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    attempts = []

    def on_chunk(index, latents, decisions):
        attempts.append(len(forwards))

    output = roll(
        pipe,
        steady_noise(5, [3]),
        num_inference_steps=3,
        drift_signal=drift_signal,
        max_regenerations=max_regenerations,
        on_chunk=on_chunk,
    )
    # The jump is in the noise: it stays far above the threshold. A third attempt would repeat the second.
    assert triggers(output.decisions[0]) == ([3] if max_regenerations else [])
    regenerations = min(max_regenerations, 1) * (3 if drift_signal == "final" else 1)
    costs = [b - a for a, b in zip([0, *attempts], attempts)]
    assert costs == [4, 4, 4, 4 + regenerations, 3]


def test_renoise_is_called_once_per_chunk_and_step():
    """And never after the last step; a regeneration replays its results."""
    asked = []

    def renoise(chunk, step):
        asked.append((chunk, step))
        return same_draws()(chunk, step)

    output = roll(
        latent_pipeline(scheduler=FlowMatchLCMScheduler(shift=5.0)),
        steady_noise(5, [3]),
        renoise=renoise,
        num_inference_steps=3,
        drift_signal="first_step",
    )
    assert triggers(output.decisions[0]) == [3]
    assert asked == [(chunk, step) for chunk in range(5) for step in range(2)]


@every_scheduler
@pytest.mark.parametrize("many", [False, True], ids=["one generator", "a list"])
def test_trimming_draws_no_more_random_numbers(stock, many):
    states = []
    for method in ("plain", eager()):
        generator = generators(0)[:1] if many else torch.Generator().manual_seed(0)
        output = roll(
            latent_pipeline(scheduler=stock()),
            noise(8, seed=3),
            generator=generator,
            method=method,
        )
        states.append((generator[0] if many else generator).get_state())
    assert triggers(output.decisions[0])
    assert torch.equal(*states)


NOTHING_TO_EVICT = {
    "all is sink": {"num_sink_frames": 5 * CHUNK},
    "all is given": {"video_latents": randn(1, 4 * CHUNK, CHANNELS, HEIGHT, WIDTH)},
    "no window": {"window_size": CHUNK},
}


@both_signals
@pytest.mark.parametrize("settings", NOTHING_TO_EVICT.values(), ids=NOTHING_TO_EVICT)
def test_chunk_is_not_regenerated_if_nothing_can_leave(settings, drift_signal):
    asked = []

    class Eager(ContextPolicy):
        def review(self, draft):
            asked.append(1)
            return [0, 1]

    method = [Eager(), SeverityMonitor(drift_signal)]
    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    plain = roll(pipe, noise(5), method=[SeverityMonitor(drift_signal)], **settings)
    num_forwards = len(forwards)
    output = roll(pipe, noise(5), method=method, **settings)
    assert asked and len(forwards) == 2 * num_forwards
    assert torch.equal(output.frames, plain.frames) and output.decisions == plain.decisions


def test_attempts_stop_if_one_would_repeat():
    """The same tokens again have already left. The other video of the batch asks for other tokens and continues."""

    class Eager(ContextPolicy):
        max_regenerations = 3

        def review(self, draft):
            self.reviews = getattr(self, "reviews", 0) + 1
            return [self.reviews % NUM_TOKENS if self.video else 0]

        def close(self, entered):
            reviews, self.reviews = self.reviews, 0
            return {"reviews": reviews}

    output = roll(latent_pipeline(), noise(3, 2), method=[Eager()])
    assert [[each["reviews"] for each in decisions] for decisions in output.decisions] == [[1, 2, 2], [1, 4, 4]]
    assert [[each["tokens"] for each in decisions] for decisions in output.decisions] == [
        [[], [0], [0]],
        [[], [1, 2, 3], [1, 2, 3]],
    ]


@every_scheduler
@both_signals
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_equals_single_runs(stock, drift_signal, guidance_scale):
    latents, text, negative = noise(8, 3, seed=4), embeds(3), embeds(3, seed=8)

    def run(videos):
        return roll(
            latent_pipeline(scheduler=stock()),
            latents[videos],
            prompt_embeds=text[videos],
            negative_prompt_embeds=negative[videos],
            guidance_scale=guidance_scale,
            generator=generators(*videos),
            drift_sensitivity=0.0,
            drift_signal=drift_signal,
            prune_fraction=0.3,
            window_size=12,
            num_sink_frames=1,
        )

    batch = run([0, 1, 2])
    assert len({tuple(triggers(decisions)) for decisions in batch.decisions}) > 1
    for video in range(3):
        single = run([video])
        torch.testing.assert_close(batch.frames[[video]], single.frames, atol=1e-5, rtol=0)
        for ours, theirs in zip(batch.decisions[video], single.decisions[0], strict=True):
            assert (ours["trim"], ours["tokens"]) == (theirs["trim"], theirs["tokens"])


def test_one_eviction_serves_both_guidance_branches():
    """With the prompt on both branches, guidance changes nothing, not even after an eviction."""
    settings = {"drift_sensitivity": 0.0, "prompt_embeds": embeds(), "prune_fraction": 0.4}
    plain = roll(latent_pipeline(), noise(9, seed=3), **settings)
    assert triggers(plain.decisions[0])
    same = roll(latent_pipeline(), noise(9, seed=3), guidance_scale=4.0, negative_prompt_embeds=embeds(), **settings)
    torch.testing.assert_close(same.frames, plain.frames, atol=1e-4, rtol=0)
    other = roll(
        latent_pipeline(), noise(9, seed=3), guidance_scale=4.0, negative_prompt_embeds=embeds(seed=8), **settings
    )
    assert (other.frames - plain.frames).abs().max() > 0.1


def test_prompts_and_videos_per_prompt_equal_single_runs():
    prompts = ["a red circle moving left", "a blue square"]
    settings = {"num_frames": 45, "output_type": "latent", "drift_sensitivity": 0.0, "guidance_scale": 2.0}
    batch = full_pipeline()(
        prompts, negative_prompt=["green", "a"], num_videos_per_prompt=2, generator=generators(0, 1, 2, 3), **settings
    )
    assert len(batch.decisions) == 4
    assert len({tuple(triggers(decisions)) for decisions in batch.decisions}) > 1
    for video in range(4):
        single = full_pipeline()(
            prompts[video // 2],
            negative_prompt=["green", "a"][video // 2],
            generator=generators(video),
            **settings,
        )
        torch.testing.assert_close(batch.frames[[video]], single.frames, atol=1e-5, rtol=0)


def test_embeddings_work_with_videos_per_prompt():
    settings = {"num_videos_per_prompt": 2, "generator": generators(0, 1, 2, 3), "height": 32, "width": 48}
    pipe = latent_pipeline()
    batch = pipe(
        prompt_embeds=embeds(2), num_frames=21, output_type="latent", num_inference_steps=2, **settings
    ).frames
    single = pipe(
        prompt_embeds=embeds(2)[1:],
        num_frames=21,
        output_type="latent",
        num_inference_steps=2,
        **{**settings, "num_videos_per_prompt": 1, "generator": generators(2)},
    ).frames
    torch.testing.assert_close(batch[2:3], single, atol=1e-5, rtol=0)


@both_signals
def test_decisions_serialize_to_json(drift_signal):
    decisions = roll(latent_pipeline(), steady_noise(5, [3, 4]), drift_signal=drift_signal).decisions
    assert json.loads(json.dumps(decisions)) == decisions
    keys = {"chunk", "severity", "threshold", "trim", "tokens", "regenerated_severity", "quarantined"}
    for video_decisions in decisions:
        assert [decision["chunk"] for decision in video_decisions] == list(range(5))
        assert all(set(decision) == keys | {"reanchored"} for decision in video_decisions)
        assert [decision["threshold"] is None for decision in video_decisions] == [True, True, True, False, False]
