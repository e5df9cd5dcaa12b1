"""Drift, severity, gate and decision against the paper's formulas written out."""

import json

import pytest
import torch
from builders import noise, randn
from oracle import drift_of, severity_of, threshold_of

from tokentrim import ContextPolicy, TokenTrim
from tokentrim.tokentrim_policies.chain import ContextPolicies
from tokentrim.tokentrim_policies.stability import severity, summarize, token_drift, unstable_tokens
from tokentrim.tokentrim_policies.trim import SeverityMonitor, TokenDrift


PATCH = (1, 2, 2)
GRID = (2, 3)
KEYS = {
    "chunk",
    "severity",
    "threshold",
    "trim",
    "tokens",
    "regenerated_severity",
    "quarantined",
    "reanchored",
}


def play(policy, severities):
    """Accept chunks with these severities; a pair is (first attempt, attempt after the eviction, ...)."""
    policies = ContextPolicies([policy], 1, GRID, PATCH)
    decisions, level = [], 0.0
    for attempts in [0.0, *severities]:
        attempts = attempts if isinstance(attempts, tuple) else (attempts,)
        for attempt in attempts:
            chunk = torch.full((1, 1, 1, 4, 6), (level + attempt) / 2)  # a patch has 4 values: norm 2
            if not (unstable := policies.review(chunk)):
                break
            policies.evicted(unstable)
        level += attempt
        assert torch.equal(policies.commit(chunk), chunk)
        decisions += policies.close()
    return decisions


def values(decisions, name):
    return [decision[name] for decision in decisions]


def test_drift_and_severity_equal_the_slow_way():
    now, before = noise(1, 2, seed=1), noise(1, 2, seed=2)
    drift = token_drift(summarize(now, PATCH), summarize(before, PATCH))
    for video in range(2):
        expected = drift_of(now[video : video + 1], before[video : video + 1])
        assert drift[video].tolist() == pytest.approx(expected, abs=1e-5)
        worst = unstable_tokens(drift, 0.4)
        expected_severity, expected_tokens = severity_of(expected, 0.4)
        assert worst[video].tolist() == expected_tokens
        assert severity(drift, worst)[video].item() == pytest.approx(expected_severity, abs=1e-5)


def test_policy_of_one_video_equals_the_slow_way():
    now, before = noise(1, seed=1), noise(1, seed=2)
    policy = TokenTrim(prune_fraction=0.4, warmup_chunks=0)
    assert policy.review(before[0]) == []
    assert policy.close(True) == {}
    assert policy.review(now[0]) == []
    facts, drift = policy.close(True), drift_of(now, before)
    assert facts["severity"] == pytest.approx(severity_of(drift, 0.4)[0], abs=1e-5)
    assert facts["threshold"] is None and "regenerated_severity" not in facts


def test_summary_of_half_precision_is_fp32():
    latents = (noise(11) + 8).bfloat16()
    summary = summarize(latents, PATCH)
    assert summary.dtype == torch.float32 and torch.equal(summary, summarize(latents.float(), PATCH))


@pytest.mark.parametrize(
    "prune_fraction, num_tokens, expected",
    [(0.1, 6, 1), (0.1, 64, 7), (0.1, 1560, 156), (0.07, 100, 7), (0.29, 100, 29), (0.001, 64, 1), (0.99, 10, 10)],
)
def test_unstable_tokens_are_ceil_p_n(prune_fraction, num_tokens, expected):
    assert unstable_tokens(randn(1, num_tokens), prune_fraction).shape == (1, expected)


@pytest.mark.parametrize("warmup_chunks, opens_at", [(0, 2), (1, 2), (2, 3), (4, 5), (6, None)])
def test_gate_opens_after_the_warmup(warmup_chunks, opens_at):
    """The first chunk has no severity, and the second has no statistics to compare with."""
    decisions = play(TokenTrim(warmup_chunks=warmup_chunks), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert [d["chunk"] for d in decisions if d["threshold"] is not None] == list(range(opens_at or 7, 7))
    assert decisions[0]["severity"] is None and values(decisions[1:], "severity") == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("drift_sensitivity", [0.0, 1.5, 2.0])
def test_threshold_is_mean_and_population_deviation_of_accepted_severities(drift_sensitivity):
    """The severity of the accepted attempt enters: 1.5 here, not the discarded 9.0."""
    decisions = play(TokenTrim(drift_sensitivity=drift_sensitivity), [1.0, 2.0, (9.0, 1.5), 1.0, 0.5])
    assert values(decisions[:4], "trim") == [False, False, False, True]
    assert (decisions[3]["severity"], decisions[3]["regenerated_severity"]) == pytest.approx((9.0, 1.5))
    for decision, history in zip(decisions[3:], ([1.0, 2.0], [1.0, 2.0, 1.5], [1.0, 2.0, 1.5, 1.0])):
        assert decision["threshold"] == pytest.approx(threshold_of(history, drift_sensitivity))


def test_severity_at_the_threshold_is_not_above_it():
    decisions = play(TokenTrim(), [1.0, 1.0, 1.0])
    assert decisions[3]["severity"] == decisions[3]["threshold"] and not decisions[3]["trim"]


@pytest.mark.parametrize("max_regenerations, attempts", [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_regenerations_are_limited_and_the_last_is_accepted(max_regenerations, attempts):
    *_, decision = play(TokenTrim(max_regenerations=max_regenerations), [1.0, 1.0, (9.0, 8.0, 7.0, 6.0)])
    assert decision["severity"] == pytest.approx(9.0)
    assert decision["trim"] == (max_regenerations > 0)
    last = (9.0, 8.0, 7.0, 6.0)[attempts - 1]
    assert decision["regenerated_severity"] == (pytest.approx(last) if max_regenerations else None)


def test_regeneration_stops_once_normal():
    *_, decision = play(TokenTrim(max_regenerations=3), [1.0, 1.0, (9.0, 1.0, 9.0)])
    assert decision["regenerated_severity"] == pytest.approx(1.0)


def test_each_video_has_its_own_gate():
    policies = ContextPolicies([TokenTrim()], 2, GRID, PATCH)
    batch = torch.zeros(2, 1, 1, 4, 6)
    for chunk in range(4):
        attempt = batch + chunk
        attempt[1, ..., :2, :2] += 20 * (chunk == 3)
        assert policies.review(attempt) == ({1: [0]} if chunk == 3 else {})
        if chunk == 3:
            policies.evicted({1: [0]})
            assert policies.review(batch + chunk) == {}
        policies.commit(batch + chunk)
        decisions = policies.close()
    assert values(decisions, "trim") == [False, True]
    assert values(decisions, "tokens") == [[], [0]]
    assert decisions[0]["regenerated_severity"] is None


def test_monitor_measures_like_tokentrim_and_accepts_everything():
    severities = [1.0, 1.0, 9.0, 1.0]
    watched, trimmed = play(SeverityMonitor(), severities), play(TokenTrim(max_regenerations=0), severities)
    assert values(watched, "severity") == values(trimmed, "severity")
    assert not any(values(watched, "trim")) and values(watched, "threshold") == [None] * 5


@pytest.mark.parametrize(("drift_signal", "severity"), [("final", 2.0), ("first_step", None)])
def test_only_the_final_signal_compares_with_given_frames(drift_signal, severity):
    """Given frames have no x0 prediction of a first step."""
    policy = TokenTrim(drift_signal=drift_signal)
    policy.observe(torch.zeros(1, 1, 4, 6))
    assert policy.close(True) == {}
    policy.review(torch.ones(1, 1, 4, 6))
    assert policy.close(True).get("severity") == severity


def test_next_chunk_is_not_compared_with_a_rejected_one():
    policy = TokenTrim()
    for level, entered, expected in ((0.0, True, None), (5.0, False, 10.0), (1.0, True, 2.0), (2.0, True, 2.0)):
        policy.review(torch.full((1, 1, 4, 6), level))
        assert policy.close(entered).get("severity") == expected


def test_decisions_are_plain_json():
    decisions = play(TokenTrim(), [1.0, 1.0, (9.0, 1.0), 1.0])
    assert json.loads(json.dumps(decisions)) == decisions
    assert all(set(decision) == KEYS for decision in decisions)


def test_token_drift_is_reported_when_it_is_asked_for():
    """That of the first attempt, whatever other policies do; its severity is the mean of the largest."""
    (decisions,) = [play(TokenDrift(), [1.0, 1.0, (9.0, 1.0), 1.0])]
    now, before = noise(1, seed=1), noise(1, seed=2)
    policy = TokenDrift()
    assert policy.review(before[0]) == [] and policy.close(True) == {"drift": None}
    assert policy.review(now[0]) == policy.review(before[0]) == []
    assert policy.close(True)["drift"] == pytest.approx(drift_of(now, before), abs=1e-5)
    assert decisions[0]["drift"] is None and [len(each["drift"]) for each in decisions[1:]] == [6] * 4
    assert set(decisions[0]) == KEYS | {"drift"} and json.loads(json.dumps(decisions)) == decisions


def test_default_policy_accepts_everything():
    policy, chunk = ContextPolicy(), randn(4, 3, 4, 6)
    assert policy.observe(chunk) is None and policy.prompt_changed() is None
    assert list(policy.review(chunk)) == [] and policy.commit(chunk) is chunk and policy.close(True) == {}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prune_fraction": 1.0}, ValueError, "`prune_fraction` .*1.0"),
        ({"drift_sensitivity": -1}, ValueError, "`drift_sensitivity` .*-1"),
        ({"warmup_chunks": -1}, ValueError, "`warmup_chunks` .*-1"),
        ({"max_regenerations": 0.5}, TypeError, "`max_regenerations` .*0.5"),
        ({"drift_signal": "last"}, ValueError, "`drift_signal` .*'first_step'.*'last'"),
    ],
)
def test_bad_settings_raise(settings, error, message):
    with pytest.raises(error, match=message):
        TokenTrim(**settings)


def test_state_continues_a_chain_of_policies():
    """Between two chunks; with plain values, tensors and lists, so that a run can be saved."""
    chunks = [randn(2, 4, 3, 4, 6, seed=seed) for seed in range(6)]

    def advance(policies, chunks):
        outcomes = []
        for chunk in chunks:
            unstable = policies.review(chunk)
            if unstable:
                policies.review(0.5 * chunk)
            outcomes += [unstable, policies.commit(chunk).tolist(), policies.close()]
        return outcomes

    def chain():
        return ContextPolicies([TokenTrim(drift_sensitivity=0.0)], 2, GRID, PATCH)

    one, other = chain(), chain()
    advance(one, chunks[:3])
    other.load_state_dict(one.state_dict())
    after = advance(one, chunks[3:])
    assert advance(other, chunks[3:]) == after
    assert any(after[0::3])
