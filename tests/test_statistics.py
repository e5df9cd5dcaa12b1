"""Statistics of latents against their formulas, and the values that each matching takes and keeps."""

import math

import pytest
import torch
from builders import CHANNELS, CHUNK, HEIGHT, WIDTH, randn
from oracle import threshold_of

from tokentrim.tokentrim_policies.matching import (
    MATCHINGS,
    MAX_NEIGHBORS,
    MatchCovariance,
    MatchDistribution,
    MatchHistogram,
    MatchMean,
    MatchMoments,
    MatchNear,
    quantile_means,
)
from tokentrim.tokentrim_policies.outliers import (
    magnitude,
    mean_offsets,
    outlier_threshold,
    quantiles,
    resampled,
)


KINDS = sorted(MATCHINGS)
WHOLE = [kind for kind in KINDS if kind not in ("near", "shift")]  # those that hold all that is in a chunk


def video(seed: int, scale: float = 1.0, shift: float = 0.0, num_frames: int = CHUNK) -> torch.Tensor:
    return scale * randn(CHANNELS, num_frames, HEIGHT, WIDTH, seed=seed) + shift


# The gate


@pytest.mark.parametrize("sensitivity", [0.0, 2.0, 6.0])
def test_threshold_is_mean_and_population_deviation(sensitivity):
    history = [1.0, 2.0, 1.5, 1.0]
    for count in range(1, 5):
        expected = threshold_of(history[:count], sensitivity)
        assert outlier_threshold(history[:count], sensitivity, 1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("warmup", "opens_with"), [(0, 1), (1, 1), (2, 2), (4, 4)])
def test_threshold_is_none_during_the_warmup(warmup, opens_with):
    thresholds = [outlier_threshold([1.0] * count, 2.0, warmup) for count in range(6)]
    assert [threshold is None for threshold in thresholds] == [count < opens_with for count in range(6)]


def test_spread_floor_is_a_share_of_the_mean_and_the_least_spread():
    even, wide = [2.0, 2.0, 2.0], [1.0, 3.0]
    assert outlier_threshold(even, 6.0, 1) == 2.0
    assert outlier_threshold(even, 6.0, 1, 0.1) == pytest.approx(2.0 + 6 * 0.2)
    assert outlier_threshold(wide, 6.0, 1, 0.1) == outlier_threshold(wide, 6.0, 1) == pytest.approx(2.0 + 6 * 1.0)


def test_threshold_is_computed_in_float64():
    """Values that differ by less than fp32 resolves at their size."""
    history = [1e8, 1e8 + 1]
    assert outlier_threshold(history, 2.0, 1) == pytest.approx(1e8 + 0.5 + 2 * 0.5, rel=1e-15)


# Values


def test_quantiles_are_the_sorted_values_of_each_channel():
    latents = video(0)
    assert quantiles(latents).tolist() == [sorted(channel.flatten().tolist()) for channel in latents]
    assert torch.equal(
        quantiles(torch.stack([latents, video(1)])), torch.stack([quantiles(latents), quantiles(video(1))])
    )


def test_resampled_values_are_interpolated_between_the_ends():
    assert resampled(torch.tensor([[0.0, 1.0, 4.0]]), 5).tolist() == [[0.0, 0.5, 1.0, 2.5, 4.0]]
    values = quantiles(video(0))
    assert resampled(values, values.shape[-1]) is values


def test_mean_offsets_are_in_standard_deviations_of_the_reference():
    reference = video(0, 2.0, 0.7)
    assert magnitude(mean_offsets(reference, reference)) == 0
    offsets = mean_offsets(reference + 2 * reference.std((1, 2, 3), keepdim=True), reference)
    torch.testing.assert_close(offsets, torch.full((CHANNELS,), 2.0))
    one_channel = reference.clone()
    one_channel[0] += 3 * reference[0].std()
    assert magnitude(mean_offsets(one_channel, reference)) == pytest.approx(3 / math.sqrt(CHANNELS), abs=1e-5)


# Matchings


@pytest.mark.parametrize("num_frames", [1, 3, 4])
@pytest.mark.parametrize("kind", WHOLE)
def test_channels_take_the_mean_of_the_reference(kind, num_frames):
    reference = video(1, 2.0, 0.7, num_frames)
    matched = MATCHINGS[kind](reference)(video(0))
    assert matched.shape == (CHANNELS, CHUNK, HEIGHT, WIDTH)
    tolerance = 0.1 if kind in ("histogram", "distribution") else 1e-5  # these are smooth: close, not the same
    torch.testing.assert_close(matched.mean((1, 2, 3)), reference.mean((1, 2, 3)), atol=tolerance, rtol=0)


def test_mean_matching_changes_only_the_mean():
    latents = video(0)
    difference = MatchMean(video(1, 2.0, 0.7))(latents) - latents
    torch.testing.assert_close(difference, difference[:, :1, :1, :1].expand_as(difference))


def test_moment_matching_takes_the_spread():
    latents, reference = video(0), video(1, 2.0, 0.7)
    matched = MatchMoments(reference)(latents)
    torch.testing.assert_close(matched.std((1, 2, 3)), reference.std((1, 2, 3)))
    for after, before in zip(matched, latents):
        assert torch.corrcoef(torch.stack([after.flatten(), before.flatten()]))[0, 1] > 1 - 1e-5
    assert torch.isfinite(MatchMoments(reference)(torch.zeros(CHANNELS, CHUNK, HEIGHT, WIDTH))).all()


def test_histogram_matching_takes_the_shape():
    """A long tail on one side: moments keep both sides equal."""
    latents, reference = video(0), video(1).exp()
    errors = {
        match: (quantile_means(match(reference)(latents), 8) - quantile_means(reference, 8)).square().mean().sqrt()
        for match in (MatchMoments, MatchHistogram)
    }
    assert errors[MatchHistogram] < 0.5 * errors[MatchMoments], errors


@pytest.mark.parametrize("kind", KINDS)
def test_matching_keeps_values_with_equal_statistics(kind):
    reference = video(1, 2.0, 0.7)
    torch.testing.assert_close(MATCHINGS[kind](reference)(reference), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_matching_keeps_nearly_equal_values(kind):
    """Flat areas gain no noise, and rounding does not grow: a map by ranks fails both."""
    latents, reference = video(0), video(1, 2.0, 0.7)
    latents[:, :, : HEIGHT // 2] = 0.2 + 1e-6 * latents[:, :, : HEIGHT // 2]
    match = MATCHINGS[kind](reference)
    matched = match(latents)
    assert matched[:, :, : HEIGHT // 2].flatten(1).std(1).max() < 1e-4
    bound = 2e-4 if kind == "distribution" else 1e-4  # twelve maps one after the other: 1.4e-4 on some CPUs
    assert (match(latents * (1 + 1e-6)) - matched).abs().max() < bound


def test_distribution_matching_takes_the_joint_distribution():
    """Channels that are correlated only in the reference: histograms keep that, the joint distribution does not."""
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


def test_covariance_matching_moves_least():
    """Means and covariance become the reference's; the map is symmetric and positive, and no other such map is."""
    latents, reference = video(0), video(1, 2.0, 0.7)
    reference[1] = reference[0] + 0.1 * reference[1]
    matched = MatchCovariance(reference)(latents)
    torch.testing.assert_close(torch.cov(matched.flatten(1)), torch.cov(reference.flatten(1)), atol=1e-4, rtol=0)
    before, after = (each.flatten(1) - each.flatten(1).mean(dim=1, keepdim=True) for each in (latents, matched))
    transport = torch.linalg.lstsq(before.T, after.T).solution.T
    torch.testing.assert_close(transport, transport.T, atol=1e-4, rtol=0)
    assert (torch.linalg.eigvalsh(transport) > 0).all()
    assert torch.isfinite(MatchCovariance(reference)(torch.zeros(CHANNELS, CHUNK, HEIGHT, WIDTH))).all()


def test_covariance_of_one_channel_equals_moments():
    latents, reference = video(0)[:1], video(1, 2.0, 0.7)[:1]
    matched = MatchMoments(reference)(latents)
    torch.testing.assert_close(MatchCovariance(reference)(latents), matched, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_with_equal_statistics_do_not_change(kind):
    torch.testing.assert_close(MATCHINGS[kind](video(0))(video(0)), video(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_matched_like_single_videos(kind):
    references, latents = (torch.stack([video(seed, 2.0, 0.7), video(seed + 1)]) for seed in (1, 5))
    batch = MATCHINGS[kind](references)(latents)
    for index in range(2):
        single = MATCHINGS[kind](references[index])(latents[index])
        torch.testing.assert_close(batch[index], single, atol=1e-5, rtol=0)


def scene(*, ground: float, share: float = 0.5, shift: float = 0.0) -> torch.Tensor:
    """A sky at -1 in all channels, and a ground with this share of the picture, both slightly uneven."""
    rows = round(share * HEIGHT)
    latents = torch.full((CHANNELS, CHUNK, HEIGHT, WIDTH), -1.0)
    latents[:, :, HEIGHT - rows :] = ground
    return latents + shift + 0.03 * video(7)


def test_near_is_the_difference_of_two_mean_shifts():
    """Written out token by token."""
    reference, latents = 0.1 * video(0), 0.1 * video(1, shift=0.5)
    width, rare, expected = 0.1, 0.05, latents.flatten(1).T.clone()
    others = reference.flatten(1).T
    for _ in range(2):
        before = expected.clone()
        for index, token in enumerate(before):
            theirs, ours = ((-(token - each).square().mean(1) / (2 * width**2)).exp() for each in (others, before))
            moved = (theirs @ others) / theirs.sum() - (ours @ before) / ours.sum()
            expected[index] = token + theirs.mean() / (theirs.mean() + rare) * moved
    matched = MatchNear(reference, width, num_steps=2, rare=rare)(latents)
    assert (matched - latents).abs().max() > 0.02
    torch.testing.assert_close(matched.flatten(1).T, expected, atol=1e-5, rtol=0)


def test_near_undoes_a_small_shift_and_leaves_new_content():
    """The ground turns into another, larger one, while the sky shifts: the sky returns, and the new ground stays. A
    matching that holds the whole distribution turns some of it into sky."""
    reference = scene(ground=1.0)
    shifted = scene(ground=1.0, shift=0.1)
    assert (MatchNear(reference)(shifted) - reference).abs().mean() < 0.3 * 0.1
    other = scene(ground=3.0, share=0.75, shift=0.1)
    rows = HEIGHT - round(0.75 * HEIGHT)
    matched = MatchNear(reference)(other)
    assert (matched - other)[:, :, rows:].abs().max() < 1e-6
    assert (matched.mean((1, 3))[:, :rows].mean() + 1).abs() < 0.3 * 0.1
    assert (MatchDistribution(reference)(other) - other)[:, :, rows:].abs().max() > 0.5


def test_near_samples_tokens_of_large_latents():
    """The same densities in 64 times as many tokens, of which it uses a few evenly spaced ones."""
    large = scene(ground=1.0).repeat(1, 4, 8, 8)
    assert large[0].numel() > 2 * MAX_NEIGHBORS
    assert (MatchNear(large)(large + 0.1) - large).mean().abs() < 0.3 * 0.1
