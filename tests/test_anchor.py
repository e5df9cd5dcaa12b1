"""Re-anchoring: what becomes context is held to the first chunk, unless the change is meant."""

import pytest
import torch
from builders import CHANNELS, CHUNK, HEIGHT, WIDTH, embeds, latent_pipeline, noise, randn, roll

from tokentrim.tokentrim_anchor import (
    REANCHORINGS,
    Anchor,
    match_distribution,
    match_histogram,
    match_mean,
    match_moments,
    offset,
)


KINDS = sorted(REANCHORINGS)


def video(seed: int, scale: float = 1.0, shift: float = 0.0, num_frames: int = CHUNK) -> torch.Tensor:
    return scale * randn(CHANNELS, num_frames, HEIGHT, WIDTH, seed=seed) + shift


# The formulas


@pytest.mark.parametrize("num_frames", [1, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_take_the_mean_of_the_reference(kind, num_frames):
    reference = video(1, 2.0, 0.7, num_frames)
    matched = REANCHORINGS[kind](video(0), reference)
    assert matched.shape == (CHANNELS, CHUNK, HEIGHT, WIDTH)
    # A histogram of another size is interpolated: its mean is close, not the same.
    tolerance = 0.15 if kind in ("histogram", "distribution") and num_frames != CHUNK else 1e-5
    torch.testing.assert_close(matched.mean((1, 2, 3)), reference.mean((1, 2, 3)), atol=tolerance, rtol=0)


def test_mean_keeps_the_rest():
    latents = video(0)
    difference = match_mean(latents, video(1, 2.0, 0.7)) - latents
    torch.testing.assert_close(difference, difference[:, :1, :1, :1].expand_as(difference))


def test_moments_take_the_spread_and_keep_the_form():
    latents, reference = video(0), video(1, 2.0, 0.7)
    matched = match_moments(latents, reference)
    torch.testing.assert_close(matched.std((1, 2, 3)), reference.std((1, 2, 3)))
    for ours, theirs in zip(matched, latents):
        assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 1 - 1e-5
    assert torch.isfinite(match_moments(torch.zeros(CHANNELS, CHUNK, HEIGHT, WIDTH), reference)).all()


def test_histogram_takes_all_values_and_keeps_their_order():
    latents, reference = video(0), video(1, 2.0, 0.7)
    matched = match_histogram(latents, reference)
    assert torch.equal(matched.flatten(1).sort().values, reference.flatten(1).sort().values)
    assert torch.equal(matched.flatten(1).argsort(), latents.flatten(1).argsort())


def test_distribution_takes_what_the_channels_have_in_common_too():
    """Channels that go together in the reference alone: histograms leave that, the joint distribution does not."""
    latents, reference = video(0), video(1)
    reference[1] = reference[0] + 0.1 * reference[1]
    spread = torch.cov(reference.flatten(1))
    apart, joint = (
        (torch.cov(match(latents, reference).flatten(1)) - spread).abs().max()
        for match in (match_histogram, match_distribution)
    )
    assert joint < 0.2 < 0.8 < apart
    again = match_distribution(match_distribution(latents, reference), reference)
    torch.testing.assert_close(torch.cov(again.flatten(1)), spread, atol=0.2, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_with_the_reference_s_statistics_stays(kind):
    torch.testing.assert_close(REANCHORINGS[kind](video(0), video(0)), video(0), atol=1e-5, rtol=0)


def test_offset_is_in_standard_deviations_of_the_reference():
    reference = video(0, 2.0, 0.7)
    assert offset(reference, reference) == 0
    assert offset(reference + reference.std((1, 2, 3), keepdim=True), reference) == pytest.approx(1.0, abs=1e-5)


# The anchor


def test_a_change_beyond_the_tolerance_moves_the_anchor_of_its_video_alone():
    anchor = Anchor("moments", tolerance=1.0)
    first = torch.stack([video(0), video(1)])
    assert torch.equal(anchor.hold(first), first)
    changed = torch.stack([video(2), video(3, shift=2.0)])
    held = anchor.hold(changed)
    torch.testing.assert_close(held[0].mean((1, 2, 3)), first[0].mean((1, 2, 3)))
    torch.testing.assert_close(held[1], changed[1], atol=1e-5, rtol=0)
    later = anchor.hold(torch.stack([video(4), video(5, shift=1.8)]))
    torch.testing.assert_close(later[0].mean((1, 2, 3)), first[0].mean((1, 2, 3)))
    torch.testing.assert_close(later[1].mean((1, 2, 3)), changed[1].mean((1, 2, 3)))


# In the rollout


def test_off_by_default():
    pipe, latents = latent_pipeline(), noise(4)
    assert torch.equal(roll(pipe, latents).frames, roll(pipe, latents, reanchor=None).frames)
    assert not torch.equal(roll(pipe, latents).frames, roll(pipe, latents, reanchor="mean").frames)


@pytest.mark.parametrize("kind", KINDS)
def test_later_chunks_read_the_held_chunk_and_the_video_shows_the_generated_one(kind):
    """The same as continuing from the first chunk and the held second one."""
    latents = noise(3)
    plain, held = roll(latent_pipeline(), latents).frames, roll(latent_pipeline(), latents, reanchor=kind).frames
    assert torch.equal(held[:, :, : 2 * CHUNK], plain[:, :, : 2 * CHUNK])
    first, second, third = held.split(CHUNK, dim=2)
    context = torch.cat([first, REANCHORINGS[kind](second[0], first[0])[None]], dim=2)
    continued = roll(latent_pipeline(), latents, video_latents=context.transpose(1, 2)).frames
    torch.testing.assert_close(third, continued[:, :, 2 * CHUNK :], atol=1e-5, rtol=0)
    assert not torch.allclose(third, plain[:, :, 2 * CHUNK :], atol=1e-3)


def test_a_given_video_is_read_as_it_is_and_its_last_chunk_is_the_anchor():
    latents, given = noise(4), noise(2, seed=5)
    plain, held = (
        roll(latent_pipeline(), latents, video_latents=given.transpose(1, 2), **settings).frames
        for settings in ({}, {"reanchor": "moments"})
    )
    assert torch.equal(held[:, :, : 3 * CHUNK], plain[:, :, : 3 * CHUNK])
    third, last = held[:, :, 2 * CHUNK : 3 * CHUNK], given[:, :, CHUNK:]
    context = torch.cat([given, match_moments(third[0], last[0])[None]], dim=2)
    continued = roll(latent_pipeline(), latents, video_latents=context.transpose(1, 2)).frames
    torch.testing.assert_close(held[:, :, 3 * CHUNK :], continued[:, :, 3 * CHUNK :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_a_batch_equals_single_runs(rollout):
    latents, text = noise(5, 2), embeds(2)
    settings = {"rollout": rollout, "window_size": 12, "reanchor": "histogram", "reanchor_tolerance": 0.6}
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings).frames
    for index in range(2):
        single = roll(latent_pipeline(), latents[[index]], prompt_embeds=text[[index]], **settings).frames
        torch.testing.assert_close(batch[[index]], single, atol=1e-5, rtol=0)


def test_a_tolerance_lets_a_change_through():
    latents = noise(4)
    latents[:, :, 2 * CHUNK :] += 3
    plain, held, tolerant = (
        roll(latent_pipeline(), latents, **settings).frames[:, :, 3 * CHUNK :]
        for settings in ({}, {"reanchor": "moments"}, {"reanchor": "moments", "reanchor_tolerance": 0.3})
    )
    assert (tolerant - plain).abs().mean() < 0.5 * (held - plain).abs().mean()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reanchor": "median"}, ValueError, "`reanchor` .*'histogram'.*'median'"),
        ({"reanchor": True}, TypeError, "`reanchor` .*'mean'.*True"),
        ({"reanchor": "mean", "reanchor_tolerance": 0}, ValueError, "`reanchor_tolerance` .*> 0.*0"),
        ({"reanchor": "mean", "reanchor_tolerance": "1"}, TypeError, "`reanchor_tolerance` .*> 0.*'1'"),
        ({"reanchor_tolerance": 1.0}, ValueError, "`reanchor_tolerance` .*None where `reanchor` is None.*1.0"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        roll(latent_pipeline(), noise(2), **arguments)
