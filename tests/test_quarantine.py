"""Quarantine: a chunk that breaks with the one before it is shown and never read; what stays is let in."""

import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    HEIGHT,
    WIDTH,
    embeds,
    far_noise,
    far_pipeline,
    latent_pipeline,
    randn,
    roll,
    steady_noise,
)

from tokentrim.tokentrim_anchor import quantiles
from tokentrim.tokentrim_quarantine import WARMUP_CHUNKS, Quarantine, jump


BROKEN = WARMUP_CHUNKS + 2  # the chunk that jumps, the first that can be told by a margin
NUM_CHUNKS = BROKEN + 3
ON = {"token_trim": False, "quarantine_sensitivity": 6.0}


def quarantined(decisions: list[dict]) -> list[int]:
    return [decision["chunk"] for decision in decisions if decision["quarantined"]]


def chunks_of(latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return latents.split(CHUNK, dim=2)


# The judgement


def test_jump_is_blind_to_places_and_says_how_far_values_are():
    latents = randn(CHANNELS, CHUNK, HEIGHT, WIDTH)
    values = quantiles(latents)
    assert jump(quantiles(latents.flip(1, 2, 3).roll((1, 2), (2, 3))), values) == 0
    assert jump(quantiles(latents + 0.3), values) == pytest.approx(0.3, abs=1e-5)
    assert jump(values, quantiles(latents.repeat(1, 2, 1, 1))) < 0.05  # of another length


def play(shifts: list[float], sensitivity: float | None = 6.0) -> list[int]:
    """Which chunks of a video are broken, the values of each shifted by so much against the first one's."""
    quarantine, chunk = Quarantine(1, sensitivity), randn(1, CHANNELS, CHUNK, HEIGHT, WIDTH)
    return [index for index, shift in enumerate(shifts) if quarantine.judge(chunk + shift)]


CALM = [0.01 * index for index in range(WARMUP_CHUNKS + 1)]


def test_what_is_gone_again_is_a_defect_and_what_stays_was_meant():
    later = CALM[-1]
    assert play([*CALM, later + 1, later + 0.01, later + 0.02]) == [len(CALM)]
    assert play([*CALM, later + 1, later + 1.01, later + 1.02]) == [len(CALM)]
    assert play([*CALM, later + 1], None) == []


def test_nothing_is_told_before_the_warm_up_and_slow_change_never():
    assert play([*CALM[:-1], 1.0]) == []
    assert play([0.01 * index for index in range(40)]) == []


def test_the_floor_holds_where_jumps_are_all_alike():
    """Even jumps have no spread; six floors of a tenth above their mean is the least that counts."""
    last, step = CALM[-1], 0.01
    assert play([*CALM, last + 1.5 * step]) == []
    assert play([*CALM, last + 1.7 * step]) == [len(CALM)]


# In the rollout


@pytest.mark.parametrize("token_trim", [False, True])
def test_no_later_chunk_depends_on_a_quarantined_one(token_trim):
    """Two defects: with quarantine the same future, without it two."""
    one = steady_noise(NUM_CHUNKS, [BROKEN])
    other = one.clone()
    other[:, :, BROKEN * CHUNK : (BROKEN + 1) * CHUNK] *= -1
    settings = {"token_trim": token_trim, "max_regenerations": 0}
    guarded = [roll(latent_pipeline(), each, quarantine_sensitivity=6.0, **settings) for each in (one, other)]
    bare = [roll(latent_pipeline(), each, **settings) for each in (one, other)]
    assert [quarantined(each.decisions[0]) for each in guarded] == [[BROKEN], [BROKEN]]
    assert [quarantined(each.decisions[0]) for each in bare] == [[], []]
    broken, after = slice(BROKEN, BROKEN + 1), slice(BROKEN + 1, None)
    for runs, same in ((guarded, True), (bare, False)):
        ours, theirs = (torch.stack(chunks_of(run.frames)) for run in runs)
        assert torch.equal(ours[:BROKEN], theirs[:BROKEN])
        assert not torch.allclose(ours[broken], theirs[broken], atol=1e-2)
        assert torch.equal(ours[after], theirs[after]) == same
    shown, unguarded = (chunks_of(run.frames)[BROKEN] for run in (guarded[0], bare[0]))
    assert torch.equal(shown, unguarded)  # shown as it was generated
    severities = [[decision["severity"] for decision in run.decisions[0][BROKEN + 1 :]] for run in guarded]
    assert severities[0] == severities[1]  # nor is it what the next one is compared with


def test_a_change_that_stays_is_read():
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    latents[:, :, BROKEN * CHUNK :, :2, :2] = latents[:, :, BROKEN * CHUNK : (BROKEN + 1) * CHUNK, :2, :2].repeat(
        1, 1, NUM_CHUNKS - BROKEN, 1, 1
    )
    assert quarantined(roll(latent_pipeline(), latents, **ON).decisions[0]) == [BROKEN]


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_a_batch_equals_single_runs(rollout):
    latents, text = steady_noise(NUM_CHUNKS, [BROKEN, BROKEN + 1]), embeds(2)
    settings = {"rollout": rollout, "window_size": 15, "reanchor": "distribution", **ON}
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings)
    for index in range(2):
        single = roll(latent_pipeline(), latents[[index]], prompt_embeds=text[[index]], **settings)
        torch.testing.assert_close(batch.frames[[index]], single.frames, atol=1e-5, rtol=0)
        assert quarantined(batch.decisions[index]) == quarantined(single.decisions[0])
    if rollout == "self_forcing":
        assert [quarantined(each) for each in batch.decisions] == [[BROKEN], [BROKEN + 1]]


def test_a_broken_chunk_does_not_move_the_anchor():
    """However far away it is: a tolerance that lets it through without quarantine changes nothing with it."""
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    settings = {"token_trim": False, "reanchor": "moments", "reanchor_patience": 1}
    for sensitivity, same in ((6.0, True), (None, False)):
        strict, tolerant = (
            roll(
                latent_pipeline(),
                latents,
                quarantine_sensitivity=sensitivity,
                reanchor_tolerance=tolerance,
                **settings,
            ).frames
            for tolerance in (None, 0.4)
        )
        assert torch.equal(strict, tolerant) == same


def test_given_frames_are_never_quarantined():
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    given = steady_noise(BROKEN + 1, [BROKEN]).transpose(1, 2)
    output = roll(latent_pipeline(), latents, video_latents=given, **ON)
    assert quarantined(output.decisions[0]) == []


def test_a_quarantined_chunk_of_any_flow_far_is_never_read_in_full_or_compressed():
    partition = [1, *[2] * 8]
    one = far_noise(1).repeat(1, 1, 17, 1, 1) + 0.05 * far_noise(17, seed=1)
    start = 1 + 2 * (BROKEN - 1)
    one[:, :, start : start + 2, :4, :4] += 6
    other = one.clone()
    other[:, :, start : start + 2] *= -1
    ours, theirs = (
        far_pipeline()(
            latents=each,
            prompt_embeds=embeds(),
            chunk_partition=partition,
            num_inference_steps=2,
            output_type="latent",
            **ON,
        )
        for each in (one, other)
    )
    assert quarantined(ours.decisions[0]) == quarantined(theirs.decisions[0]) == [BROKEN]
    assert not torch.allclose(ours.frames[:, :, start], theirs.frames[:, :, start], atol=1e-2)
    assert torch.equal(ours.frames[:, :, start + 2 :], theirs.frames[:, :, start + 2 :])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quarantine_sensitivity": -1}, ValueError, "`quarantine_sensitivity` .*>= 0.*-1"),
        ({"quarantine_sensitivity": "6"}, TypeError, "`quarantine_sensitivity` .*>= 0.*'6'"),
        ({"quarantine_sensitivity": 6, "window_size": 6}, ValueError, "`quarantine_sensitivity` .*window of 9.*6"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        roll(latent_pipeline(), steady_noise(3, [1]), **arguments)


def test_a_sink_is_context_enough():
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    output = roll(latent_pipeline(), latents, window_size=6, num_sink_frames=3, **ON)
    assert torch.isfinite(output.frames).all()
