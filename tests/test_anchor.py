"""Re-anchoring: what becomes context is held to the first chunk, unless the change is meant."""

from unittest.mock import patch

import pytest
import torch
from builders import CHANNELS, CHUNK, HEIGHT, WIDTH, embeds, latent_pipeline, noise, randn, roll

from tokentrim.tokentrim_anchor import (
    REANCHORINGS,
    Anchor,
    MatchDistribution,
    MatchHistogram,
    MatchMean,
    MatchMoments,
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
    matched = REANCHORINGS[kind](reference)(video(0))
    assert matched.shape == (CHANNELS, CHUNK, HEIGHT, WIDTH)
    # A histogram of another size is interpolated: its mean is close, not the same.
    tolerance = 0.15 if kind in ("histogram", "distribution") and num_frames != CHUNK else 1e-5
    torch.testing.assert_close(matched.mean((1, 2, 3)), reference.mean((1, 2, 3)), atol=tolerance, rtol=0)


def test_mean_keeps_the_rest():
    latents = video(0)
    difference = MatchMean(video(1, 2.0, 0.7))(latents) - latents
    torch.testing.assert_close(difference, difference[:, :1, :1, :1].expand_as(difference))


def test_moments_take_the_spread_and_keep_the_form():
    latents, reference = video(0), video(1, 2.0, 0.7)
    matched = MatchMoments(reference)(latents)
    torch.testing.assert_close(matched.std((1, 2, 3)), reference.std((1, 2, 3)))
    for ours, theirs in zip(matched, latents):
        assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 1 - 1e-5
    assert torch.isfinite(MatchMoments(reference)(torch.zeros(CHANNELS, CHUNK, HEIGHT, WIDTH))).all()


def test_histogram_takes_all_values_and_keeps_their_order():
    latents, reference = video(0), video(1, 2.0, 0.7)
    matched = MatchHistogram(reference)(latents)
    assert torch.equal(matched.flatten(1).sort().values, reference.flatten(1).sort().values)
    assert torch.equal(matched.flatten(1).argsort(), latents.flatten(1).argsort())


def test_distribution_takes_what_the_channels_have_in_common_too():
    """Channels that go together in the reference alone: histograms leave that, the joint distribution does not."""
    latents, reference = video(0), video(1)
    reference[1] = reference[0] + 0.1 * reference[1]
    spread = torch.cov(reference.flatten(1))
    apart, joint = (
        (torch.cov(match(reference)(latents).flatten(1)) - spread).abs().max()
        for match in (MatchHistogram, MatchDistribution)
    )
    assert joint < 0.2 < 0.8 < apart
    again = MatchDistribution(reference)(MatchDistribution(reference)(latents))
    torch.testing.assert_close(torch.cov(again.flatten(1)), spread, atol=0.2, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_with_the_reference_s_statistics_stays(kind):
    torch.testing.assert_close(REANCHORINGS[kind](video(0))(video(0)), video(0), atol=1e-5, rtol=0)


def test_offset_is_in_standard_deviations_of_the_reference():
    reference = video(0, 2.0, 0.7)
    assert offset(reference, reference) == 0
    assert offset(reference + reference.std((1, 2, 3), keepdim=True), reference) == pytest.approx(1.0, abs=1e-5)


# The anchor


def steady(*offsets: float) -> list[torch.Tensor]:
    """Chunks of one video, so many standard deviations away from the first."""
    first = video(0)
    return [(first + each * first.std((1, 2, 3), keepdim=True))[None] for each in (0.0, *offsets)]


def is_held(anchor: Anchor, chunks: list[torch.Tensor]) -> list[bool]:
    return [not torch.allclose(anchor.hold(chunk), chunk, atol=1e-5) for chunk in chunks]


def test_drift_is_held_for_good_and_what_insists_is_let_go_and_held_where_it_settles():
    drift = steady(*[0.15] * 40)
    assert is_held(Anchor("mean", 0.2, 3), drift) == [False] * 3 + [True] * 38  # watched first
    assert is_held(Anchor("mean", None, 3), drift) == [False] + [True] * 40
    # Settled with the third; insists with 0.31; moves until 1.2; settled three chunks later.
    change = steady(0.1, 0.11, 0.12, 0.13, 0.3, 0.31, 0.32, 0.6, 0.9, 1.2, 1.21, 1.22, 1.23, 1.24)
    anchor = Anchor("mean", 0.2, 3)
    assert is_held(anchor, change) == [False] * 3 + [True] * 3 + [False] * 7 + [True] * 2
    torch.testing.assert_close(anchor.hold(change[-1]), change[10], atol=1e-5, rtol=0)


def test_a_change_from_the_start_is_never_held_back():
    change = steady(*[0.3 * index for index in range(1, 20)])
    assert not any(is_held(Anchor("mean", 0.2, 3), change))


def test_one_chunk_is_no_change():
    chunks = steady(0.1, 0.11, 0.12, 0.9, 0.1, 0.12, 0.9, 0.11)
    assert is_held(Anchor("mean", 0.2, 3), chunks) == [False] * 3 + [True] * 6


def test_a_broken_chunk_is_never_meant():
    chunks, defects = steady(0.1, 3.0, 3.0, 3.0, 0.1, 0.12, 0.13), (2, 3, 4)
    guarded, bare = Anchor("mean", 0.2, 3), Anchor("mean", 0.2, 3)
    for index, chunk in enumerate(chunks):
        held, followed = guarded.hold(chunk, {0} if index in defects else ()), bare.hold(chunk)
    torch.testing.assert_close(held, chunks[0], atol=1e-5, rtol=0)
    assert torch.equal(followed, chunks[-1])


def test_videos_of_a_batch_are_held_one_by_one():
    anchor = Anchor("moments", 0.2, 2)
    for quiet, loud in zip(steady(*[0.1] * 3), steady(0.5, 1.0, 1.5)):
        held = anchor.hold(torch.cat([quiet, loud]))
    torch.testing.assert_close(held[0], video(0), atol=1e-5, rtol=0)
    assert torch.equal(held[1], loud[0])


@pytest.mark.parametrize(("tolerance", "before", "settled"), [(None, 1, 7), (0.2, 3, 5)])
def test_what_is_let_go_is_held_where_it_settles(tolerance, before, settled):
    """Where it is after the patience, or with a tolerance where it has been since then."""
    anchor, chunks = Anchor("mean", tolerance, 3), steady(0.1, 0.11, 0.12, 0.13, 0.8, 0.81, 0.82, 0.83, 0.84)
    assert is_held(anchor, chunks[:5]) == [False] * before + [True] * (5 - before)
    anchor.let_go()
    assert is_held(anchor, chunks[5:]) == [False] * 3 + [True] * 2
    torch.testing.assert_close(anchor.hold(chunks[-1]), chunks[settled], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_of_a_batch_may_be_of_different_lengths(kind):
    """FAR begins with a chunk of one frame: the video that goes away is held to a longer one."""
    anchor = Anchor(kind, 1.0, 1)
    anchor.hold(torch.stack([video(0, num_frames=1), video(1, num_frames=1)]))
    second = torch.stack([video(2), video(3, shift=2.0)])
    assert torch.equal(anchor.hold(second)[1], second[1])
    anchor.hold(second)  # settled
    third = torch.stack([video(5), video(5, shift=2.0)])
    held = anchor.hold(third)
    torch.testing.assert_close(held[0], REANCHORINGS[kind](video(0, num_frames=1))(third[0]))
    torch.testing.assert_close(held[1], REANCHORINGS[kind](second[1])(third[1]))


# In the rollout


def test_a_prompt_that_a_callback_changes_lets_go():
    """In chunk 3: the two chunks from there on are not held, without that they are."""
    latents, calls = noise(7), []

    def change(pipe, step, timestep, tensors):
        calls.append(step)
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if len(calls) == 2 * 3 + 1 else {}

    def same(pipe, step, timestep, tensors):
        calls.append(step)
        return {"prompt_embeds": tensors["prompt_embeds"]}

    def record(self, chunk, broken=(), hold=Anchor.hold):
        context = hold(self, chunk, broken)
        held.append(not torch.allclose(context, chunk, atol=1e-5))
        return context

    for callback, expected in ((change, [False, True, True, False, False, True]), (same, [False, *[True] * 5])):
        held = []
        calls.clear()
        with patch.object(Anchor, "hold", record):
            roll(
                latent_pipeline(),
                latents,
                reanchor="mean",
                reanchor_patience=2,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            )
        assert held == expected


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
    context = torch.cat([first, REANCHORINGS[kind](first[0])(second[0])[None]], dim=2)
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
    context = torch.cat([given, MatchMoments(last[0])(third[0])[None]], dim=2)
    continued = roll(latent_pipeline(), latents, video_latents=context.transpose(1, 2)).frames
    torch.testing.assert_close(held[:, :, 3 * CHUNK :], continued[:, :, 3 * CHUNK :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_a_batch_equals_single_runs(rollout):
    latents, text = noise(5, 2), embeds(2)
    settings = {
        "rollout": rollout,
        "window_size": 12,
        "reanchor": "histogram",
        "reanchor_patience": 1,
        "reanchor_tolerance": 0.6,
    }
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings).frames
    for index in range(2):
        single = roll(latent_pipeline(), latents[[index]], prompt_embeds=text[[index]], **settings).frames
        torch.testing.assert_close(batch[[index]], single, atol=1e-5, rtol=0)


def test_a_tolerance_lets_a_change_through():
    latents = noise(4)
    latents[:, :, 2 * CHUNK :] += 3
    plain, held, tolerant = (
        roll(latent_pipeline(), latents, **settings).frames[:, :, 3 * CHUNK :]
        for settings in (
            {},
            {"reanchor": "moments"},
            {"reanchor": "moments", "reanchor_patience": 1, "reanchor_tolerance": 0.3},
        )
    )
    assert (tolerant - plain).abs().mean() < 0.5 * (held - plain).abs().mean()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reanchor": "median"}, ValueError, "`reanchor` .*'histogram'.*'median'"),
        ({"reanchor": True}, TypeError, "`reanchor` .*'mean'.*True"),
        ({"reanchor": "mean", "reanchor_tolerance": 0}, ValueError, "`reanchor_tolerance` .*> 0.*0"),
        ({"reanchor": "mean", "reanchor_tolerance": "1"}, TypeError, "`reanchor_tolerance` .*> 0.*'1'"),
        ({"reanchor_patience": 0}, ValueError, "`reanchor_patience` .*>= 1.*0"),
        ({"reanchor_patience": 1.5}, TypeError, "`reanchor_patience` .*>= 1.*1.5"),
        ({"reanchor_tolerance": 1.0}, ValueError, "`reanchor_tolerance` .*None without `reanchor`.*1.0"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        roll(latent_pipeline(), noise(2), **arguments)
