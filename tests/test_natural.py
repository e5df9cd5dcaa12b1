"""The bench of natural latents: its encoder, its drifts, and what matchings do to them."""

import sys

import pytest
import torch

from research.natural import bench
from research.natural.bench import CANDIDATES, make_table, measure, removed_share
from research.natural.latents import (
    DRIFTS,
    NUM_CHANNELS,
    PatchEncoder,
    WorldEncoder,
    load_photographs,
    make_pairs,
    offset,
)
from research.natural.matchings import MatchCoarseToFine, MatchSmoothNear
from research.training.autoencoder import make_autoencoder
from research.training.photographs import SIZES
from tokentrim.tokentrim_policies.matching import MatchNear, MatchShift, smooth


@pytest.fixture(scope="module")
def pairs():
    photographs = load_photographs()
    few = {name: photographs[name] for name in ("meadow", "sunset")}
    return make_pairs(few, PatchEncoder(few))


@pytest.fixture(scope="module")
def table(pairs):
    names = ("mean", "near", "near on 7 x 7", "shift")
    return make_table({name: CANDIDATES[name] for name in names}, pairs)


def test_patch_latents_have_unit_variance_and_no_correlation():
    photographs = load_photographs()
    encoder = PatchEncoder(photographs)
    latents = torch.cat([encoder(each[None]).flatten(1) for each in photographs.values()], dim=1)
    assert latents.shape[0] == NUM_CHANNELS
    assert torch.allclose(latents.mean(dim=1), torch.zeros(NUM_CHANNELS), atol=1e-3)
    assert torch.allclose(torch.cov(latents), torch.eye(NUM_CHANNELS), atol=1e-3)


def test_chunks_of_a_pair(pairs):
    first, second = pairs
    assert first.reference.shape == first.moved.shape == first.half_new.shape == (NUM_CHANNELS, 3, 24, 32)
    assert torch.equal(first.half_new[..., :16], first.moved[..., :16])
    assert torch.equal(first.half_new[..., 16:], second.moved[..., 16:])


def test_world_encoder_normalizes_with_the_statistics_of_its_config(tmp_path):
    torch.manual_seed(0)
    vae = make_autoencoder(SIZES)
    frames = torch.rand(3, 3, 96, 96)
    vae.save_pretrained(tmp_path / "plain" / "vae")
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    vae.save_pretrained(tmp_path / "other" / "vae")
    plain, other = (WorldEncoder(tmp_path / name)(frames) for name in ("plain", "other"))
    assert plain.shape == (16, 3, 12, 12)
    assert torch.allclose(other, (plain - 0.5) / 2, atol=1e-5)


def test_drifts_have_the_size_that_they_name(pairs):
    latents = pairs[0].moved
    assert offset(latents, 0, 0.3).square().mean().sqrt() == pytest.approx(0.3, rel=1e-5)
    for make_drift, size in DRIFTS.values():
        drift = make_drift(latents, 1, size)
        assert drift.shape == latents.shape and torch.isfinite(drift).all()
    gradient = DRIFTS["gradient 0.3"][0](latents, 1, 0.3)
    assert gradient.mean().abs() < 1e-6 and torch.equal(gradient[..., 0], -gradient[..., -1])


def test_removed_share_is_the_projection_of_what_is_left():
    drift, kept = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert removed_share(drift, kept, kept) == 1
    assert removed_share(drift, kept, drift) == 0
    assert removed_share(drift, kept, 0.25 * drift) == 0.75


def test_the_mean_removes_every_offset_and_pulls_new_content(table):
    assert table.loc["mean", "offset 0.1"] == pytest.approx(1, abs=1e-3)
    assert table.loc["mean", "offset 0.3"] == pytest.approx(1, abs=1e-3)
    assert abs(table.loc["mean", "gradient 0.3"]) < 1e-3
    assert table.loc["mean", "pull"] > 2 * table.loc["near", "pull"]


def test_averaging_texture_out_lets_near_remove_more(table):
    assert table.loc["near on 7 x 7", "offset 0.3"] > table.loc["near", "offset 0.3"] + 0.2


def test_shift_removes_offsets_with_little_change(table):
    row = table.loc["shift"]
    assert row["offset 0.1"] > 0.9 and row["offset 0.3"] > 0.75
    assert row["change"] < 0.08 and row["pull"] < 0.1


def test_a_smooth_average_counts_existing_places_only():
    latents = torch.ones(2, 1, 5, 6)
    assert torch.allclose(smooth(latents, 3), latents)
    latents[:, :, 0, 0] = 10
    assert smooth(latents, 3)[0, 0, 0, 0] == pytest.approx((10 + 3) / 4)
    assert torch.equal(smooth(latents, 1), latents)


def test_smooth_near_of_size_1_is_near(pairs):
    pair = pairs[0]
    assert torch.allclose(
        MatchSmoothNear(pair.reference, 1)(pair.moved), MatchNear(pair.reference)(pair.moved), atol=1e-5
    )


@pytest.mark.parametrize("make", [MatchSmoothNear, MatchCoarseToFine, MatchShift])
def test_a_matching_leaves_its_reference_alone_and_is_continuous(pairs, make):
    pair = pairs[0]
    matching = make(pair.reference)
    assert (matching(pair.reference) - pair.reference).square().mean().sqrt() < 0.02
    noise = 1e-4 * torch.randn(pair.moved.shape, generator=torch.Generator().manual_seed(0))
    change = matching(pair.moved + noise) - matching(pair.moved)
    assert change.abs().max() < 20 * noise.abs().max()


@pytest.mark.parametrize("make", [MatchSmoothNear, MatchCoarseToFine, MatchShift])
def test_a_batch_equals_single_chunks(pairs, make):
    references = torch.stack([pair.reference for pair in pairs])
    chunks = torch.stack([pair.moved for pair in pairs])
    single = torch.stack([make(pair.reference)(pair.moved) for pair in pairs])
    assert torch.allclose(make(references)(chunks), single, atol=1e-4)


def test_shift_ignores_content_that_the_reference_lacks():
    generator = torch.Generator().manual_seed(0)
    reference = 0.02 * torch.randn(4, 3, 12, 12, generator=generator)
    chunk = reference + 0.1
    chunk[..., 6:] += 3  # new
    moved = MatchShift(reference, size=1)(chunk) - chunk
    assert torch.allclose(moved, torch.full_like(moved, -0.1), atol=0.03)


def test_shift_of_nothing_known_is_zero():
    reference = torch.zeros(4, 3, 12, 12)
    chunk = torch.full_like(reference, 5.0)
    assert torch.allclose(MatchShift(reference)(chunk), chunk, atol=1e-3)


def test_every_candidate_gives_finite_numbers(pairs):
    for name, candidate in CANDIDATES.items():
        row = measure(candidate, pairs[0], seed=0)
        assert all(torch.isfinite(torch.tensor(value)) for value in row.values()), name


def test_the_command_prints_a_table_and_refuses_unknown_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "mean"])
    bench.main()
    printed = capsys.readouterr().out
    assert "| mean | 1.00 | 1.00 |" in printed and "meadow" in printed
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "median"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "median" in capsys.readouterr().err
