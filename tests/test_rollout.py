"""Latents and decisions of the pipeline against algorithm 1 written out with masks instead of a cache."""

import pytest
import torch
from builders import CHUNK, embeds, latent_pipeline, randn, roll, steady_noise, tiny_transformer, triggers
from oracle import oracle_rollout

from tokentrim import TokenTrimFlowMatchEulerDiscreteScheduler, TokenTrimFlowMatchLCMScheduler


SIGMAS = [1.0, 5 * 2 / 3 / (1 + 4 * 2 / 3), 5 / 3 / (1 + 4 / 3)]  # 3 steps, shift 5


def draws(chunk, step):
    noise = 0.1 * randn(1, 4, CHUNK, 4, 6, seed=100 + 10 * chunk + step)
    noise[..., :2, :2] += 6 if chunk == 3 else 0
    return noise


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "plain"},
        {"method": "plain", "window_size": 6},
        {"method": "plain", "window_size": 8, "num_sink_frames": 2},
        {},
        {"drift_signal": "first_step"},
        {"drift_sensitivity": 0.0},
        {"drift_sensitivity": 0.0, "guidance_scale": 2.5},
        {"drift_sensitivity": 0.0, "max_regenerations": 2, "prune_fraction": 0.5},
        {"drift_sensitivity": 0.0, "window_size": 12, "warmup_chunks": 1},
        {"drift_sensitivity": 0.0, "window_size": 9, "num_sink_frames": 3, "prune_fraction": 0.3},
        {"drift_sensitivity": 0.0, "window_size": 8, "num_sink_frames": 1, "drift_signal": "first_step"},
    ],
    ids=str,
)
@pytest.mark.parametrize("lcm", [False, True], ids=["euler", "lcm"])
def test_rollout_equals_masked_forwards(settings, lcm):
    scheduler = (TokenTrimFlowMatchLCMScheduler if lcm else TokenTrimFlowMatchEulerDiscreteScheduler)(shift=5.0)
    transformer = tiny_transformer()
    latents = steady_noise(5, [3])
    renoise = draws if lcm else None
    pipe = latent_pipeline(transformer, scheduler)
    negative = embeds(seed=8)
    output = roll(pipe, latents, num_inference_steps=3, renoise=renoise, negative_prompt_embeds=negative, **settings)
    expected, attempts = oracle_rollout(
        transformer, latents.split(CHUNK, dim=2), embeds(), SIGMAS, renoise=renoise, negative_text=negative, **settings
    )

    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    assert bool(triggers(output.decisions[0])) == (settings.get("method") != "plain")
    for decision, tried in zip(output.decisions[0], attempts):
        assert decision["trim"] == (len(tried) > 1)
        assert decision["tokens"] == sorted({token for _, tokens in tried[:-1] for token in tokens})
        assert decision["severity"] == (pytest.approx(tried[0][0], abs=1e-4) if tried else None)
        regenerated = pytest.approx(tried[-1][0], abs=1e-4) if len(tried) > 1 else None
        assert decision["regenerated_severity"] == regenerated
