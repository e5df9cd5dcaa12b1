"""TokenTrim against other references, by other criteria, and without another attempt: ours, beside the paper's."""

import pytest
import torch
from builders import CHANNELS, CHUNK, GRID, HEIGHT, NUM_TOKENS, WIDTH, embeds, latent_pipeline, noise, randn, roll

from tokentrim import ContextPolicy, TokenTrim
from tokentrim.tokentrim_policies.chain import ContextPolicies
from tokentrim.tokentrim_policies.references import NEW, REACH, nearest_drift
from tokentrim.tokentrim_policies.registry import make_method


PATCH = (1, 2, 2)
EAGER = {"drift_sensitivity": 0.0, "prune_fraction": 0.3, "warmup_chunks": 1}


def chunk(level: float) -> torch.Tensor:
    """Latents whose tokens are all `2 * level` away from those of level 0: a patch of one channel has four values."""
    return torch.full((1, 1, 4, 6), float(level))


def play(policy, levels, entered=lambda index: True):
    """The facts of chunks of a video, each of another level; `None` in front of a level is a change of prompt."""
    facts = []
    for index, level in enumerate(levels):
        if isinstance(level, tuple):
            policy.prompt_changed()
            (level,) = level
        tokens = policy.review(chunk(level))
        facts.append({"severity": None, "threshold": None, **policy.close(entered(index)), "tokens": tokens})
    return facts


def severities(facts):
    return [each["severity"] for each in facts]


# The reference


def test_slow_drift_is_abnormal_against_the_first_chunk_alone():
    levels = [0.125 * index for index in range(12)]
    before, first = (play(TokenTrim(reference=name, warmup_chunks=3), levels) for name in ("previous", "first"))
    assert severities(before)[1:] == [0.25] * 11
    assert severities(first)[1:] == [0.25 * index for index in range(1, 12)]
    assert not any(each["tokens"] for each in before)
    assert [bool(each["tokens"]) for each in first] == [False] * 4 + [True] * 8


def test_what_is_normal_is_said_by_the_first_severities():
    """Their mean, and their deviation or a tenth of it."""
    even, spread = (
        play(TokenTrim(reference="first", warmup_chunks=3), levels)
        for levels in ([0, 1, 1, 1, 1, 9, 1], [0, 1, 2, 3, 9, 9])
    )
    assert [each["threshold"] for each in even[:4]] == [None] * 4
    assert [each["threshold"] for each in even[4:]] == pytest.approx([2 + 2 * 0.2] * 3)
    deviation = torch.tensor([2.0, 4.0, 6.0]).std(correction=0).item()
    assert spread[4]["threshold"] == spread[5]["threshold"] == pytest.approx(4 + 2 * deviation)


def test_sixth_chunk_of_a_new_scene_is_the_reference():
    facts = play(TokenTrim(reference="first"), [0, 1, 2, (10,), 11, 12, 13, 14, 15, 16])
    assert severities(facts) == [None, 2.0, 4.0, *[None] * 6, pytest.approx(2.0)]


def test_another_change_of_prompt_begins_the_scene_again():
    facts = play(TokenTrim(reference="first"), [0, 1, (10,), 11, (20,), 21, 22, 23, 24, 25, 27])
    assert severities(facts)[2:] == [None] * 8 + [pytest.approx(4.0)]


def test_a_prompt_before_the_first_chunk_changes_nothing():
    assert severities(play(TokenTrim(reference="first"), [(0,), 1, 2])) == [None, 2.0, 4.0]


def test_severities_of_a_new_scene_are_its_own():
    policy = TokenTrim(reference="first", warmup_chunks=2)
    facts = play(policy, [0, 1, 1, 1, (9,), 9, 9, 9, 9, 9, 14, 14, 14])
    assert [each["threshold"] is not None for each in facts] == [False] * 3 + [True] + [False] * 8 + [True]


@pytest.mark.parametrize(("reference", "expected"), [("previous", 2.0), ("first", 4.0)])
def test_last_given_chunk_is_the_reference(reference, expected):
    policy = TokenTrim(reference=reference)
    for level in (5, 0):
        policy.observe(chunk(level))
        policy.close(True)
    assert severities(play(policy, [1, 2])) == [2.0, expected]


def test_given_frames_end_the_settling_of_a_scene():
    policy = TokenTrim(reference="first")
    play(policy, [0, (5,)])
    policy.observe(chunk(7))
    policy.close(True)
    assert severities(play(policy, [8])) == [2.0]


def test_rejected_chunk_is_never_the_reference():
    facts = play(TokenTrim(reference="first"), [9, 0, 1, 2], entered=lambda index: index > 0)
    assert severities(facts) == [None, None, 2.0, 4.0]


# The criterion


def test_nearest_drift_equals_the_slow_way():
    summary, reference = randn(2, 7, 16, seed=1) * 0.6, randn(2, 5, 16, seed=2) * 0.6
    drift = nearest_drift(summary, reference)
    for video in range(2):
        for token in range(7):
            nearest = min((summary[video, token] - each).norm().item() for each in reference[video])
            expected = nearest if nearest <= REACH * 4 else NEW
            assert drift[video, token].item() == pytest.approx(expected, abs=1e-5)
    assert (drift == NEW).any() and drift.isfinite().any()


def picture(*values: float) -> torch.Tensor:
    """A chunk of one channel whose tokens have one value each, (1, 1, 4, 6)."""
    grid = torch.tensor(values).view(1, 1, *GRID)
    return grid.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def test_moved_and_new_tokens_stay_and_displaced_ones_leave():
    """The first token is a displaced 0, three are at other places, and the last two are new."""
    first, moved = picture(0, 10, 20, 30, 40, 50), picture(0.5, 20, 30, 10, 75, 95)
    for criterion, share, expected in (
        ("nearest", 0.1, [0]),
        ("nearest", 0.9, [0, 1, 2, 3]),
        ("same_place", 0.1, [5]),
        ("same_place", 0.5, [3, 4, 5]),
    ):
        policy = TokenTrim(share, 0.0, 1, reference="first", criterion=criterion)
        for each in (first, first):
            assert policy.review(each) == []
            policy.close(True)
        assert policy.review(moved) == expected


# Eviction without another attempt


class Leave(ContextPolicy):
    """Names tokens at one chunk; they leave without another attempt."""

    regenerate = False

    def __init__(self, at: int = 2, tokens: tuple = (1, 4)):
        self.at, self.tokens, self.index = at, tokens, 0

    def review(self, draft):
        return self.tokens if self.index == self.at else ()

    def close(self, entered):
        self.index += 1
        return {}


def test_tokens_leave_before_the_next_chunk_at_no_call():
    pipe, forwards, latents = latent_pipeline(), [], noise(5)
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    plain = roll(pipe, latents, method="plain")
    count = len(forwards)
    output = roll(pipe, latents, method=[Leave()])
    assert len(forwards) == 2 * count
    assert torch.equal(output.frames[:, :, : 3 * CHUNK], plain.frames[:, :, : 3 * CHUNK])
    assert not torch.allclose(output.frames[:, :, 3 * CHUNK :], plain.frames[:, :, 3 * CHUNK :], atol=1e-3)
    decisions = output.decisions[0]
    assert [each["tokens"] for each in decisions] == [[], [], [1, 4], [], []]
    assert [each["trim"] for each in decisions] == [False, False, True, False, False]


def test_the_chunk_itself_loses_them_too():
    """As eviction before another attempt at the next chunk, which then reads the same context."""
    seen = []

    class Look(ContextPolicy):
        def review(self, draft):
            seen.append(len(cache().book.held[0].nonzero()))
            return ()

    pipe = latent_pipeline()
    plan = pipe.plan(
        latents=noise(4),
        prompt_embeds=embeds(),
        output_type="latent",
        num_inference_steps=2,
        method=[Leave(1), Look()],
    )
    run = pipe.begin(plan)

    def cache():
        return run.backbone.cache

    list(pipe.roll_out(run))
    kept = NUM_TOKENS - 2
    assert seen == [0, CHUNK * NUM_TOKENS, 2 * CHUNK * kept, 2 * CHUNK * kept + CHUNK * NUM_TOKENS]


def test_a_sink_keeps_its_tokens():
    settings = {"window_size": 12, "num_sink_frames": 3, "method": [Leave(at=0)]}
    output = roll(latent_pipeline(), noise(3), **settings)
    assert not any(each["trim"] for each in output.decisions[0])  # the sink is all that chunk 1 could lose


def test_last_attempt_says_what_leaves():
    """Where another policy asks for a second attempt."""

    class Twice(Leave):
        def review(self, draft):
            self.attempt = getattr(self, "attempt", 0) + 1
            return [self.attempt]

    class Again(ContextPolicy):
        def review(self, draft):
            return [5]

    policies = ContextPolicies([Twice(), Again()], 1, GRID)
    assert policies.review(noise(1)) == {0: [5]}
    policies.evicted({0: [5]})
    assert policies.review(noise(1)) == {}
    assert policies.leaving == {0: [2]}
    policies.evicted(policies.leaving)
    assert policies.close()[0]["tokens"] == [2, 5]
    assert policies.leaving == {}


def test_nothing_leaves_after_the_last_chunk():
    output = roll(latent_pipeline(), noise(3), method=[Leave(at=2)])
    assert not output.decisions[0][2]["trim"]


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_videos_of_a_batch_lose_their_own(rollout):
    latents, text = noise(6, 2, seed=4), embeds(2)
    latents[:, :, CHUNK:] = latents[:, :, :CHUNK].repeat(1, 1, 5, 1, 1) + 0.2 * latents[:, :, CHUNK:]
    method = {"tokentrim": {**EAGER, "reference": "first", "regenerate": False}}
    settings = {"method": method, "rollout": rollout, "window_size": 12, "num_sink_frames": 3}
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings)
    assert any(each["trim"] for each in batch.decisions[0])
    for index in range(2):
        single = roll(latent_pipeline(), latents[[index]], prompt_embeds=text[[index]], **settings)
        torch.testing.assert_close(batch.frames[[index]], single.frames, atol=1e-5, rtol=0)
        assert [each["tokens"] for each in batch.decisions[index]] == [each["tokens"] for each in single.decisions[0]]


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reference": "second"}, ValueError, "`reference` .*'first'.*'second'"),
        ({"reference": None}, TypeError, "`reference` .*'previous'.*None"),
        ({"criterion": "near"}, ValueError, "`criterion` .*'nearest'.*'near'"),
        ({"regenerate": 1}, TypeError, "`regenerate` .*True or False.*1"),
        ({"reference": "first", "prune_fraction": 0.9}, ValueError, "`prune_fraction` .*6 of 6 tokens.*0.9"),
    ],
)
def test_bad_input_raises(settings, error, message):
    with pytest.raises(error, match=message):
        roll(latent_pipeline(), noise(2), method={"tokentrim": settings})


def test_defaults_are_the_papers():
    (policy,) = make_method("tokentrim", {}).policies
    assert (policy.reference, policy.criterion, policy.regenerate) == ("previous", "same_place", True)
    roll(latent_pipeline(), randn(1, CHANNELS, 2 * CHUNK, HEIGHT, WIDTH), prune_fraction=0.9)  # still allowed
