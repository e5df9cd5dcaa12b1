"""Drift, severity, gate and decision against the paper's formulas written out."""

import json
import math

import pytest
import torch
from builders import noise, randn
from oracle import drift_of, severity_of, threshold_of

from tokentrim import TokenTrimPolicy
from tokentrim.tokentrim_stability import severity, summarize, token_drift, unstable_tokens


PATCH = (1, 2, 2)
KEYS = {"chunk", "severity", "threshold", "trim", "tokens", "drift", "regenerated_severity", "quarantined"}


def play(policy, severities):
    """Accept chunks that drift by these severities; a pair is (first attempt, attempt after the eviction, ...)."""
    decisions, level, previous = [], 0.0, None
    for attempts in [0.0, *severities]:
        attempts = attempts if isinstance(attempts, tuple) else (attempts,)
        for attempt in attempts:
            chunk = torch.full((1, 1, 1, 4, 6), (level + attempt) / 2)  # a patch has 4 values: norm 2
            if not policy.review(previous, chunk):
                break
        previous, level = chunk, level + attempt
        decisions += policy.accept()
    return decisions


def test_drift_and_severity_equal_the_loops():
    now, before = noise(1, 2, seed=1), noise(1, 2, seed=2)
    drift = token_drift(summarize(now, PATCH), summarize(before, PATCH))
    for video in range(2):
        expected = drift_of(now[video : video + 1], before[video : video + 1])
        assert drift[video].tolist() == pytest.approx(expected, abs=1e-5)
        worst = unstable_tokens(drift, 0.4)
        expected_severity, expected_tokens = severity_of(expected, 0.4)
        assert worst[video].tolist() == expected_tokens
        assert severity(drift, worst)[video].item() == pytest.approx(expected_severity, abs=1e-5)


def test_summary_of_half_precision_is_fp32():
    assert summarize(noise(1).bfloat16(), PATCH).dtype == torch.float32


@pytest.mark.parametrize(
    "prune_fraction, num_tokens, expected",
    [(0.1, 6, 1), (0.1, 64, 7), (0.1, 1560, 156), (0.07, 100, 7), (0.29, 100, 29), (0.001, 64, 1), (0.99, 10, 10)],
)
def test_unstable_tokens_are_ceil_p_n(prune_fraction, num_tokens, expected):
    assert unstable_tokens(randn(1, num_tokens), prune_fraction).shape == (1, expected)


@pytest.mark.parametrize("warmup_chunks, opens_at", [(0, 2), (1, 2), (2, 3), (4, 5), (math.inf, None)])
def test_gate_opens_after_the_warmup(warmup_chunks, opens_at):
    """The first chunk has no severity and the second no statistics to be compared with."""
    decisions = play(TokenTrimPolicy(PATCH, 1, warmup_chunks=warmup_chunks), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert [d.chunk for d in decisions if d.threshold is not None] == list(range(opens_at or 7, 7))
    assert decisions[0].severity is None and all(d.severity == pytest.approx(1.0) for d in decisions[1:])


@pytest.mark.parametrize("drift_sensitivity", [0.0, 1.5, 2.0])
def test_threshold_is_mean_and_population_deviation_of_accepted_severities(drift_sensitivity):
    """What enters is the accepted attempt's severity: 1.5 here, not the 9.0 that was thrown away."""
    policy = TokenTrimPolicy(PATCH, 1, drift_sensitivity=drift_sensitivity)
    decisions = play(policy, [1.0, 2.0, (9.0, 1.5), 1.0, 0.5])
    assert [d.trim for d in decisions[:4]] == [False, False, False, True]
    assert (decisions[3].severity, decisions[3].regenerated_severity) == pytest.approx((9.0, 1.5))
    for decision, history in zip(decisions[3:], ([1.0, 2.0], [1.0, 2.0, 1.5], [1.0, 2.0, 1.5, 1.0])):
        assert decision.threshold == pytest.approx(threshold_of(history, drift_sensitivity))


def test_severity_at_the_threshold_is_not_above_it():
    decisions = play(TokenTrimPolicy(PATCH, 1), [1.0, 1.0, 1.0])
    assert decisions[3].severity == decisions[3].threshold and not decisions[3].trim


@pytest.mark.parametrize("max_regenerations, attempts", [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_regenerations_are_limited_and_the_last_is_accepted(max_regenerations, attempts):
    policy = TokenTrimPolicy(PATCH, 1, max_regenerations=max_regenerations)
    *_, decision = play(policy, [1.0, 1.0, (9.0, 8.0, 7.0, 6.0)])
    assert decision.severity == pytest.approx(9.0)
    assert decision.trim == (max_regenerations > 0)
    last = (9.0, 8.0, 7.0, 6.0)[attempts - 1]
    assert decision.regenerated_severity == (pytest.approx(last) if max_regenerations else None)


def test_regeneration_stops_once_normal():
    policy = TokenTrimPolicy(PATCH, 1, max_regenerations=3)
    *_, decision = play(policy, [1.0, 1.0, (9.0, 1.0, 9.0)])
    assert decision.regenerated_severity == pytest.approx(1.0)


def test_each_video_has_a_gate_of_its_own():
    policy = TokenTrimPolicy(PATCH, 2)
    batch = torch.zeros(2, 1, 1, 4, 6)
    previous = None
    for chunk in range(4):
        attempt = batch + chunk
        attempt[1, ..., :2, :2] += 20 * (chunk == 3)
        assert policy.review(previous, attempt) == ({1: [0]} if chunk == 3 else {})
        if chunk == 3:
            assert policy.review(previous, batch + chunk) == {}
        decisions = policy.accept()
        previous = batch + chunk
    assert [d.trim for d in decisions] == [False, True]
    assert [d.tokens for d in decisions] == [[], [0]]
    assert decisions[0].regenerated_severity is None


def test_decisions_are_plain_json():
    decisions = [vars(d) for d in play(TokenTrimPolicy(PATCH, 1), [1.0, 1.0, (9.0, 1.0), 1.0])]
    assert json.loads(json.dumps(decisions)) == decisions
    assert all(set(decision) == KEYS for decision in decisions)
    assert decisions[0]["drift"] is None and all(len(d["drift"]) == 6 for d in decisions[1:])
