"""Quarantine: a chunk unlike the one before it is shown but never read; a lasting change enters."""

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

from tokentrim import Quarantine
from tokentrim.tokentrim_policies.outliers import jump, quantiles
from tokentrim.tokentrim_policies.quarantine import WARMUP_JUMPS


BROKEN = 6  # the chunk that jumps, the first that can be told by a margin
NUM_CHUNKS = BROKEN + 3
ON = {"method": {"quarantine": {"sensitivity": 6.0}}}


def quarantined(decisions: list[dict]) -> list[int]:
    return [decision["chunk"] for decision in decisions if decision["quarantined"]]


def chunks_of(latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return latents.split(CHUNK, dim=2)


# The decision


def test_jump_ignores_places_and_measures_values():
    latents = randn(CHANNELS, CHUNK, HEIGHT, WIDTH)
    values = quantiles(latents)
    assert jump(quantiles(latents.flip(1, 2, 3).roll((1, 2), (2, 3))), values) == 0
    assert jump(quantiles(latents + 0.3), values) == pytest.approx(0.3, abs=1e-5)
    assert jump(values, quantiles(latents.repeat(1, 2, 1, 1))) < 0.05  # of another length


def play(shifts: list[float], sensitivity: float = 6.0) -> list[int]:
    """Which chunks of a video are rejected, if their values are shifted by these amounts."""
    quarantine, first, rejected = Quarantine(sensitivity), randn(CHANNELS, CHUNK, HEIGHT, WIDTH), []
    for index, shift in enumerate(shifts):
        chunk = first + shift
        context = quarantine.commit(chunk)
        assert context is None or context is chunk  # as it was generated, or nothing of it
        rejected += [index] if context is None else []
        assert quarantine.close(context is not None) == {}
    return rejected


CALM = [0.01 * index for index in range(WARMUP_JUMPS + 1)]


def test_quarantine_never_rejects_twice_in_a_row():
    """A short defect disappears; a lasting change enters one chunk later."""
    later = CALM[-1]
    assert play([*CALM, later + 1, later + 0.01, later + 0.02]) == [len(CALM)]
    assert play([*CALM, later + 1, later + 1.01, later + 1.02]) == [len(CALM)]
    assert play([*CALM, later + 1, later + 9, later + 9.01]) == [len(CALM)]


def test_very_high_sensitivity_rejects_nothing():
    assert play([*CALM, CALM[-1] + 1], 1e6) == []


def test_nothing_is_rejected_before_the_warm_up_and_slow_change_never():
    assert play([*CALM[:-1], 1.0]) == []
    assert play([0.01 * index for index in range(40)]) == []


def test_rejected_jumps_do_not_enter_the_statistics():
    """The jump back from a defect is measured from the chunk before the defect."""
    later = CALM[-1]
    assert play([*CALM, later + 1, later + 0.01, later + 1.01, later + 0.02]) == [len(CALM), len(CALM) + 2]


def test_given_chunks_set_the_comparison_but_add_no_jumps():
    quarantine, first = Quarantine(), randn(CHANNELS, CHUNK, HEIGHT, WIDTH)
    for shift in (0.0, 5.0, 0.0):
        quarantine.observe(first + shift)
    assert quarantine.jumps == []
    quarantine.commit(first + 0.1)
    assert quarantine.jumps == [pytest.approx(0.1, abs=1e-5)]


def test_spread_floor_applies_to_equal_jumps():
    """Equal jumps have no spread, so six floors of a tenth above their mean is the smallest jump that counts."""
    last, step = CALM[-1], 0.01
    assert play([*CALM, last + 1.5 * step]) == []
    assert play([*CALM, last + 1.7 * step]) == [len(CALM)]


# In the rollout


@pytest.mark.parametrize("others", [{}, {"tokentrim": {"max_regenerations": 0}}], ids=["alone", "with TokenTrim"])
def test_quarantined_chunk_has_no_effect_on_later_chunks(others):
    """Two defects: the same future with quarantine, different ones without it."""
    one = steady_noise(NUM_CHUNKS, [BROKEN])
    other = one.clone()
    other[:, :, BROKEN * CHUNK : (BROKEN + 1) * CHUNK] *= -1
    guarded, bare = (
        [roll(latent_pipeline(), each, method=method) for each in (one, other)]
        for method in ({**others, "quarantine": {"sensitivity": 6.0}}, others)
    )
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


def test_lasting_change_is_read():
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    latents[:, :, BROKEN * CHUNK :, :2, :2] = latents[:, :, BROKEN * CHUNK : (BROKEN + 1) * CHUNK, :2, :2].repeat(
        1, 1, NUM_CHUNKS - BROKEN, 1, 1
    )
    assert quarantined(roll(latent_pipeline(), latents, **ON).decisions[0]) == [BROKEN]


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_a_batch_equals_single_runs(rollout):
    latents, text = steady_noise(NUM_CHUNKS, [BROKEN, BROKEN + 1]), embeds(2)
    method = {"quarantine": {"sensitivity": 6.0}, "reanchor": {"match": "near"}}
    settings = {"rollout": rollout, "window_size": 15, "method": method}
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings)
    for index in range(2):
        single = roll(latent_pipeline(), latents[[index]], prompt_embeds=text[[index]], **settings)
        torch.testing.assert_close(batch.frames[[index]], single.frames, atol=1e-5, rtol=0)
        assert quarantined(batch.decisions[index]) == quarantined(single.decisions[0])
    if rollout == "self_forcing":
        assert [quarantined(each) for each in batch.decisions] == [[BROKEN], [BROKEN + 1]]


def test_a_rejected_chunk_is_not_held():
    """Re-anchoring behind quarantine does not see it."""
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    for quarantine, rejected in ({"quarantine": {"sensitivity": 6.0}}, [BROKEN]), ({}, []):
        method = {**quarantine, "reanchor": {"match": "moments", "tolerance": None}}
        decisions = roll(latent_pipeline(), latents, method=method).decisions[0]
        assert quarantined(decisions) == rejected
        not_held = [0, *rejected, NUM_CHUNKS - 1]  # the first is the reference, and the last becomes nobody's context
        assert [decision["chunk"] for decision in decisions if decision["reanchored"] is None] == not_held


def test_given_frames_are_never_quarantined():
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    given = steady_noise(BROKEN + 1, [BROKEN]).transpose(1, 2)
    output = roll(latent_pipeline(), latents, video_latents=given, **ON)
    assert quarantined(output.decisions[0]) == []


def test_far_never_reads_a_quarantined_chunk():
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
        ({"method": {"quarantine": {"sensitivity": -1}}}, ValueError, "'quarantine'.*`sensitivity` .*>= 0.*-1"),
        ({"method": {"quarantine": {"sensitivity": "6"}}}, TypeError, "'quarantine'.*`sensitivity` .*>= 0.*'6'"),
        ({"window_size": 6, **ON}, ValueError, "`method` .*Quarantine with `window_size` 6 and no sink.* 9 latent"),
        ({"window_size": 6, "method": "tokentrim_plus"}, ValueError, "`method` .*Quarantine with `window_size` 6"),
    ],
)
def test_bad_input_raises(arguments, error, message):
    with pytest.raises(error, match=message):
        roll(latent_pipeline(), steady_noise(3, [1]), **arguments)


def test_sink_alone_is_enough_context():
    latents = steady_noise(NUM_CHUNKS, [BROKEN])
    output = roll(latent_pipeline(), latents, window_size=6, num_sink_frames=3, **ON)
    assert quarantined(output.decisions[0]) == [BROKEN] and output.frames.abs().max() < 100
