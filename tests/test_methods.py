"""Values of `method=`, refused ones, and the return values of a custom policy."""

import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    GRID,
    NUM_TOKENS,
    case_id,
    embeds,
    latent_pipeline,
    noise,
    processors,
    roll,
    steady_noise,
)

from tokentrim import ContextPolicy, FlowMo, Quarantine, Reanchor, TokenTrim, TokenTrimPipeline
from tokentrim.tokentrim_policies.chain import ContextPolicies
from tokentrim.tokentrim_policies.registry import METHODS, make_method
from tokentrim.tokentrim_policies.trim import SeverityMonitor


def kinds(method) -> list[str]:
    return [type(policy).__name__ for policy in make_method(method, {}).policies]


class Trimmer(ContextPolicy):
    """Asks for one eviction of some tokens at one chunk."""

    def __init__(self, at=2, tokens=(1, 4), **attributes):
        self.at, self.tokens, self.index, self.asked = at, tokens, 0, False
        vars(self).update(attributes)

    def review(self, draft):
        again, self.asked = self.asked, True
        return () if again or self.index != self.at else self.tokens

    def close(self, entered):
        self.index, self.asked = self.index + 1, False
        return {"index": self.index}


class Log(ContextPolicy):
    """Records the calls of its verbs, under its name."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __deepcopy__(self, memo):
        return Log(self.name, self.log)  # one log for all copies

    def observe(self, chunk):
        self.log.append((self.name, "observe"))

    def review(self, draft):
        self.log.append((self.name, "review"))
        return ()

    def commit(self, chunk):
        self.log.append((self.name, "commit"))
        return chunk

    def close(self, entered):
        self.log.append((self.name, "close"))
        return {}


# Names, dicts and lists


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("plain", ["SeverityMonitor"]),
        ("tokentrim", ["TokenTrim"]),
        ("paper", ["TokenTrim"]),
        ("tokentrim_reference", ["TokenTrim"]),
        ("tokentrim_plus", ["SeverityMonitor", "Quarantine", "Reanchor"]),
        ({}, ["SeverityMonitor"]),
        ([], ["SeverityMonitor"]),
        ("token_drift", ["SeverityMonitor", "TokenDrift"]),
        (["tokentrim", "token_drift"], ["TokenTrim", "TokenDrift"]),
        ({"reanchor": {}, "tokentrim": {}, "quarantine": {}}, ["Reanchor", "TokenTrim", "Quarantine"]),
        ([Trimmer(), "reanchor", Quarantine(), "tokentrim"], ["Trimmer", "Reanchor", "Quarantine", "TokenTrim"]),
        (("quarantine", Trimmer()), ["SeverityMonitor", "Quarantine", "Trimmer"]),
        ([Trimmer(), SeverityMonitor()], ["Trimmer", "SeverityMonitor"]),
    ],
)
def test_policies_keep_their_order_and_severity_is_always_measured(method, expected):
    assert kinds(method) == expected


def test_named_methods_match_the_documentation():
    assert list(METHODS) == ["plain", "tokentrim", "paper", "tokentrim_reference", "tokentrim_plus"]
    plus = make_method("tokentrim_plus", {}).policies
    assert (plus[1].sensitivity, plus[2].match, plus[2].tolerance) == (6.0, "near", None)
    (flowmo,) = make_method("paper", {}).hooks
    assert (flowmo.iterations, flowmo.learning_rate, flowmo.steps, flowmo.chunks) == (1, 0.005, None, "first")
    assert not make_method("tokentrim", {}).hooks


@pytest.mark.parametrize(
    ("name", "as_dict"),
    [
        ("plain", {}),
        ("tokentrim", {"tokentrim": {}}),
        ("paper", {"flowmo": {}, "tokentrim": {}}),
        ("tokentrim_plus", {"quarantine": {"sensitivity": 6.0}, "reanchor": {"match": "near"}}),
    ],
)
def test_name_dict_and_list_of_objects_are_the_same_method(name, as_dict):
    makers = {"tokentrim": TokenTrim, "flowmo": FlowMo, "quarantine": Quarantine, "reanchor": Reanchor}
    objects = [makers[part](**settings) for part, settings in as_dict.items()]
    expected, *others = (
        roll(latent_pipeline(), steady_noise(9, [3, 7]), method=each) for each in (name, as_dict, objects)
    )
    for other in others:
        assert torch.equal(other.frames, expected.frames) and other.decisions == expected.decisions


def test_settings_of_a_dict_override_those_of_the_call():
    method = make_method({"tokentrim": {"prune_fraction": 0.3}}, {"prune_fraction": 0.2, "warmup_chunks": 5})
    assert (method.policies[0].prune_fraction, method.policies[0].warmup_chunks) == (0.3, 5)


def test_settings_of_the_call_reach_a_named_tokentrim_of_a_list():
    method = make_method([Trimmer(), "tokentrim"], {"prune_fraction": 0.2, "drift_signal": "first_step"})
    assert method.policies[1].prune_fraction == 0.2 and method.drift_signal == "first_step"


@pytest.mark.parametrize(
    ("signals", "expected"),
    [([], "final"), ([None], "final"), (["first_step"], "first_step"), ([None, "first_step"], "first_step")],
)
def test_drift_signal_comes_from_the_policies(signals, expected):
    """Also for the monitor that measures severity beside them."""
    method = make_method([Trimmer(drift_signal=signal) for signal in signals], {})
    assert method.drift_signal == method.policies[0].drift_signal == expected


def test_object_and_names_in_a_list_are_methods():
    names = [type(policy).__name__ for policy in make_method(["tokentrim_plus", TokenTrim()], {}).policies]
    assert names == ["Quarantine", "Reanchor", "TokenTrim"]
    assert [type(policy).__name__ for policy in make_method(TokenTrim(), {}).policies] == ["TokenTrim"]
    (flowmo,) = make_method(["paper"], {}).hooks
    assert isinstance(flowmo, FlowMo)


class Verbless:
    def review(self, draft):
        return ()


BAD = [
    ({"method": "token_trim"}, ValueError, r"`method` must be one of .*'tokentrim_plus'.*'token_trim'"),
    ({"method": 3}, TypeError, r"`method` must be one of .*but is 3"),
    ({"method": {"trim": {}}}, ValueError, r"`method` must be a dict of .*'reanchor'.*'trim'"),
    ({"method": {3: {}}}, ValueError, r"`method` must be a dict of .*but is \[3\]"),
    ({"method": {"paper": {}}}, ValueError, r"`method` must be 'paper' without settings, or a dict"),
    ({"method": ["tokentrim", "trim"]}, ValueError, r"`method` must be one of .*'reanchor'.*'trim'"),
    (
        {"method": {"quarantine": {"sensitive": 1}}},
        ValueError,
        r"method\['quarantine'\]` .*'sensitivity'.*'sensitive'",
    ),
    ({"method": {"tokentrim": {"reanchor": "mean"}}}, ValueError, r"method\['tokentrim'\]` .*'prune_fraction'"),
    ({"method": {"flowmo": {"eta": 1}}}, ValueError, r"method\['flowmo'\]` .*'learning_rate'.*'eta'"),
    ({"method": {"quarantine": 6.0}}, TypeError, r"method\['quarantine'\]` must be a dict .*6.0"),
    ({"method": {"tokentrim": 2}}, TypeError, r"method\['tokentrim'\]` must be a dict .*2"),
    ({"method": {"tokentrim": None}}, TypeError, r"method\['tokentrim'\]` must be a dict .*None"),
    ({"method": {"quarantine": {"sensitivity": -1}}}, ValueError, r"method\['quarantine'\].*`sensitivity` .*-1"),
    ({"method": {"flowmo": {"iterations": -1}}}, ValueError, r"method\['flowmo'\].*`iterations` .*-1"),
    ({"method": [TokenTrim]}, TypeError, r"`method` must be .*an object with observe, review, .*TokenTrim"),
    ({"method": [FlowMo]}, TypeError, r"`method` must be .*an object with observe, review, .*FlowMo"),
    ({"method": [Verbless()]}, TypeError, r"`method` must be .*an object with observe, review, .*Verbless"),
    ({"method": [None]}, TypeError, r"`method` must be .*an object with .*None"),
    ({"method": "plain", "warmup_chunks": 2}, ValueError, r"`warmup_chunks` must be None .*without TokenTrim.*2"),
    (
        {"method": "tokentrim_plus", "drift_signal": "final"},
        ValueError,
        r"`drift_signal` .*without TokenTrim.*'final'",
    ),
    ({"method": [TokenTrim()], "prune_fraction": 0.2}, ValueError, r"`prune_fraction` .*without TokenTrim"),
    (
        {"method": [TokenTrim(), Trimmer(drift_signal="first_step")]},
        ValueError,
        r"`method` must be policies of one drift signal, but is \['final', 'first_step'\]",
    ),
    (
        {"method": ["tokentrim", SeverityMonitor("first_step")]},
        ValueError,
        r"`method` must be policies of one drift signal",
    ),
    ({"method": [Trimmer(drift_signal="last")]}, ValueError, r"`drift_signal` .*'first_step'.*'last'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[case_id(case[0]) for case in BAD])
def test_bad_method_raises_before_any_model_runs(arguments, error, message):
    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(error, match=message):
        roll(pipe, noise(2), **arguments)
    assert not forwards


# Policies of one's own


def test_pipeline_has_the_base_class_of_policies():
    assert TokenTrimPipeline.ContextPolicy is ContextPolicy
    assert latent_pipeline().ContextPolicy is ContextPolicy


def test_every_policy_of_a_chain_sees_every_chunk_in_order():
    log = []
    settings = {"method": [Log("one", log), Log("two", log)], "video_latents": noise(1, seed=5).transpose(1, 2)}
    roll(latent_pipeline(), noise(3), **settings)
    verbs = ["observe", "close", "review", "commit", "close", "review", "close"]  # the last chunk is not committed
    assert log == [(name, verb) for verb in verbs for name in ("one", "two")]


def test_policies_are_copied_for_each_video():
    trimmer, trim, hold, quarantine = Trimmer(), TokenTrim(drift_sensitivity=0.0), Reanchor(), Quarantine()
    before = [dict(vars(each)) for each in (trimmer, trim, hold, quarantine)]
    output = roll(latent_pipeline(), noise(7, 2), method=[trimmer, trim, quarantine, hold])
    assert [dict(vars(each)) for each in (trimmer, trim, hold, quarantine)] == before
    for video_decisions in output.decisions:
        assert [decision["index"] for decision in video_decisions] == list(range(1, 8))
    again = roll(latent_pipeline(), noise(7, 2), method=[trimmer, trim, quarantine, hold])
    assert torch.equal(again.frames, output.frames) and again.decisions == output.decisions


class Counted(TokenTrim):
    """TokenTrim that asks for nothing in videos whose first value is negative."""

    def review(self, draft):
        tokens = super().review(draft)
        self.positive = bool(draft[0, 0, 0, 0] > 0) if self.previous is None else self.positive
        return tokens if self.positive else []


def test_a_batch_equals_single_runs_with_a_custom_policy():
    latents, text = noise(7, 3, seed=4), embeds(3)
    settings = {"method": [Counted(drift_sensitivity=0.0), "reanchor"]}
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings)
    assert len({tuple(decision["trim"] for decision in each) for each in batch.decisions}) > 1
    for video in range(3):
        single = roll(latent_pipeline(), latents[[video]], prompt_embeds=text[[video]], **settings)
        torch.testing.assert_close(batch.frames[[video]], single.frames, atol=1e-5, rtol=0)
        for ours, alone in zip(batch.decisions[video], single.decisions[0], strict=True):
            assert (ours["trim"], ours["tokens"]) == (alone["trim"], alone["tokens"])


@pytest.mark.parametrize("tokens", [[1, 4], (4, 1, 1), {1, 4}, range(1, 5, 3), torch.tensor([1, 4]), iter([1, 4])])
def test_reviewed_tokens_are_evicted_and_reported(tokens):
    """Like tokens of TokenTrim: the same eviction as a chunk that is generated without them."""
    policies = ContextPolicies([Trimmer(0, tokens)], 1, GRID)
    assert policies.review(noise(1)) == {0: [1, 4]}
    policies.evicted({0: [1, 4]})
    (decision,) = policies.close()
    assert decision["trim"] and decision["tokens"] == [1, 4]


@pytest.mark.parametrize("drift_signal", ["final", "first_step"])
def test_review_evicts_and_regenerates(drift_signal):
    method = [Trimmer(2, [1, 4], drift_signal=drift_signal)]
    plain = roll(latent_pipeline(), noise(4), method=[SeverityMonitor(drift_signal)])
    output = roll(latent_pipeline(), noise(4), method=method)
    decisions = output.decisions[0]
    assert [decision["trim"] for decision in decisions] == [False, False, True, False]
    assert [decision["tokens"] for decision in decisions] == [[], [], [1, 4], []]
    assert decisions[2]["severity"] == plain.decisions[0][2]["severity"] != decisions[2]["regenerated_severity"]
    assert torch.equal(output.frames[:, :, : 2 * CHUNK], plain.frames[:, :, : 2 * CHUNK])
    assert (output.frames - plain.frames)[:, :, 2 * CHUNK : 3 * CHUNK].abs().max() > 1e-3


def test_tokens_of_several_policies_are_evicted_together():
    policies = ContextPolicies([Trimmer(0, [1, 4]), Trimmer(0, [0, 1])], 1, GRID)
    assert policies.review(noise(1)) == {0: [0, 1, 4]}
    policies.evicted({0: [0, 1, 4]})
    assert policies.close()[0]["tokens"] == [0, 1, 4]


class Endless(ContextPolicy):
    """Always asks for another attempt."""

    def __init__(self, max_regenerations=1):
        self.max_regenerations, self.reviews = max_regenerations, 0

    def review(self, draft):
        self.reviews += 1
        return [self.reviews % NUM_TOKENS]

    def close(self, entered):
        reviews, self.reviews = self.reviews, 0
        return {"reviews": reviews}


@pytest.mark.parametrize("max_regenerations", [0, 1, 3])
def test_an_endless_reviewer_stops_after_max_regenerations(max_regenerations):
    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    output = roll(pipe, noise(3), method=[Endless(max_regenerations)])
    first, *later = output.decisions[0]  # the first chunk has no context to evict from
    assert len(forwards) == (3 + 2 * max_regenerations) * 2 + 2
    assert first["reviews"] == 1 and not first["trim"] and first["tokens"] == []
    assert [decision["reviews"] for decision in later] == [1 + max_regenerations] * 2
    assert [decision["trim"] for decision in later] == [max_regenerations > 0] * 2
    assert [len(decision["tokens"]) for decision in later] == [max_regenerations] * 2


def test_max_regenerations_counts_for_each_policy():
    """A policy that may ask three times continues after another has used its turn."""
    policies = ContextPolicies([Endless(1), Endless(3)], 1, GRID)
    assert [sorted(policies.review(noise(1)).get(0, [])) for _ in range(4)] == [[1], [2], [3], []]


class Duck:
    """The five verbs and nothing else."""

    def observe(self, chunk):
        pass

    def review(self, draft):
        return [0]

    def commit(self, chunk):
        return chunk

    def close(self, entered):
        return {}

    def prompt_changed(self):
        pass


def test_object_with_some_verbs_is_a_policy():
    output = roll(latent_pipeline(), noise(3), method=[Duck()])
    assert [decision["tokens"] for decision in output.decisions[0]] == [[], [0], [0]]


# Chunks that do not enter


class Reject(ContextPolicy):
    """Rejects one chunk."""

    def __init__(self, at):
        self.at, self.index, self.entered = at, 0, []

    def commit(self, chunk):
        return None if self.index == self.at else chunk

    def close(self, entered):
        self.index += 1
        self.entered.append(entered)
        return {"entered": list(self.entered)}


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_rejected_chunk_has_no_effect_on_later_chunks(rollout):
    """Self Forcing: the future is the same whatever the chunk was. With chunks in flight, only the context is."""
    one = noise(5, 2)
    other = one.clone()
    other[0, :, 2 * CHUNK : 3 * CHUNK] *= -1
    settings = {"method": [Reject(2), "reanchor"], "rollout": rollout}
    ours, theirs = (roll(latent_pipeline(), latents, **settings) for latents in (one, other))
    for output in (ours, theirs):
        for video_decisions in output.decisions:
            assert [decision["quarantined"] for decision in video_decisions] == [False, False, True, False, False]
            assert video_decisions[-1]["entered"] == [True, True, False, True, True]
            assert [d["reanchored"] for d in video_decisions] == [None, "held", None, "held", None]
    assert torch.equal(ours.frames[:, :, : 2 * CHUNK], theirs.frames[:, :, : 2 * CHUNK]) or rollout != "self_forcing"
    assert not torch.allclose(ours.frames[0, :, 2 * CHUNK :], theirs.frames[0, :, 2 * CHUNK :], atol=1e-2)
    if rollout == "self_forcing":
        assert torch.equal(ours.frames[:, :, 3 * CHUNK :], theirs.frames[:, :, 3 * CHUNK :])
        entered = [roll(latent_pipeline(), latents, method="plain").frames[0] for latents in (one, other)]
        assert not torch.allclose(entered[0][:, 3 * CHUNK :], entered[1][:, 3 * CHUNK :], atol=1e-2)


def test_rejection_skips_the_rest_of_the_chain_but_closes_it():
    log = []
    policies = ContextPolicies([Log("one", log), Reject(0), Log("two", log)], 1, GRID)
    policies.review(noise(1))
    context = policies.commit(noise(1))
    assert policies.entered == [False] and context.shape == noise(1).shape
    assert policies.close()[0]["quarantined"]
    assert log == [("one", "review"), ("two", "review"), ("one", "commit"), ("one", "close"), ("two", "close")]
    assert policies.entered == [True]


class Shift(ContextPolicy):
    def __init__(self, factor, offset):
        self.factor, self.offset = factor, offset

    def commit(self, chunk):
        return self.factor * chunk + self.offset


def test_next_policy_sees_what_one_commits():
    latents = noise(1, 2)
    for chain, expected in (
        ([Shift(2, 0), Shift(1, 3)], 2 * latents + 3),
        ([Shift(1, 3), Shift(2, 0)], 2 * (latents + 3)),
    ):
        policies = ContextPolicies(chain, 2, GRID)
        torch.testing.assert_close(policies.commit(latents), expected)
    assert torch.equal(latents, noise(1, 2))


class ShiftInPlace(Shift):
    def commit(self, chunk):
        return chunk.mul_(self.factor).add_(self.offset)


def test_policy_that_writes_in_place_changes_only_the_context():
    for rest in ([], [Reject(1)]):
        in_place, pure = (
            roll(latent_pipeline(), noise(4, 2), method=[shift(0.5, 1.0), *rest]) for shift in (ShiftInPlace, Shift)
        )
        assert torch.equal(in_place.frames, pure.frames) and in_place.decisions == pure.decisions


@pytest.mark.parametrize("at", range(1, 9))
def test_policies_never_see_an_interrupted_draft(at):
    """Of 2 x 4 steps; the policy asks for another attempt at chunk 2, from step 5 on."""

    class Seen(Trimmer):
        def __deepcopy__(self, memo):
            return self

        def review(self, draft):
            seen.append(draft.clone())
            return super().review(draft)

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = len(steps) == at
        return {}

    seen, steps = [], []
    roll(latent_pipeline(), noise(3), method=[Seen()])
    whole, seen = seen, []
    roll(latent_pipeline(), noise(3), method=[Seen()], callback_on_step_end=callback)
    assert len(whole) == 4 and len(seen) == (at - 1) // 2
    assert all(torch.equal(one, other) for one, other in zip(seen, whole))


def test_later_chunks_read_what_is_committed():
    latents = noise(3)
    shown = roll(latent_pipeline(), latents, method=[Shift(0.5, 1.0)]).frames
    context = torch.cat([0.5 * chunk + 1 for chunk in shown[:, :, : 2 * CHUNK].split(CHUNK, dim=2)], dim=2)
    continued = roll(latent_pipeline(), latents, method="plain", video_latents=context.transpose(1, 2)).frames
    torch.testing.assert_close(shown[:, :, 2 * CHUNK :], continued[:, :, 2 * CHUNK :], atol=1e-5, rtol=0)


# Wrong returns


class Wrong(ContextPolicy):
    """Returns something wrong from one verb, at one chunk."""

    def __init__(self, verb, value, at=1):
        self.verb, self.value, self.at, self.index = verb, value, at, 0

    def answer(self, verb, otherwise):
        return self.value if (self.verb, self.at) == (verb, self.index) else otherwise

    def review(self, draft):
        return self.answer("review", ())

    def commit(self, chunk):
        return self.answer("commit", chunk)

    def close(self, entered):
        self.index += 1
        return self.value if (self.verb, self.at) == ("close", self.index - 1) else {}


WRONG = [
    ("review", [NUM_TOKENS], ValueError, "grid tokens from 0 to 5"),
    ("review", [-1], ValueError, "grid tokens from 0 to 5"),
    ("review", torch.tensor([0, 9]), ValueError, "grid tokens from 0 to 5"),
    ("review", [0.5], TypeError, "grid tokens from 0 to 5"),
    ("review", torch.tensor([0.0]), TypeError, "grid tokens from 0 to 5"),
    ("review", torch.zeros(NUM_TOKENS, dtype=torch.bool), TypeError, "grid tokens from 0 to 5"),
    ("review", [True, False], TypeError, "grid tokens from 0 to 5"),
    ("review", [[0, 1]], TypeError, "grid tokens from 0 to 5"),
    ("review", "0", TypeError, "grid tokens from 0 to 5"),
    ("review", {0: [1]}, TypeError, "grid tokens from 0 to 5"),
    ("review", 3, TypeError, "grid tokens from 0 to 5"),
    ("review", None, TypeError, "grid tokens from 0 to 5"),
    ("review", torch.tensor(3), TypeError, "grid tokens from 0 to 5"),
    ("commit", "latents", TypeError, r"latents of shape \(4, 3, 4, 6\), finite, or None"),
    ("commit", True, TypeError, r"latents of shape \(4, 3, 4, 6\)"),
    ("commit", torch.zeros(1, CHANNELS, 3, 4, 6), ValueError, r"latents of shape \(4, 3, 4, 6\)"),
    ("commit", torch.zeros(CHANNELS, 2, 4, 6), ValueError, r"latents of shape \(4, 3, 4, 6\)"),
    ("commit", torch.full((CHANNELS, 3, 4, 6), torch.nan), ValueError, "finite"),
    ("commit", torch.full((CHANNELS, 3, 4, 6), torch.inf), ValueError, "finite"),
    ("close", None, TypeError, "a dict"),
    ("close", [("severity", 1.0)], TypeError, "a dict"),
]


@pytest.mark.parametrize(("verb", "value", "error", "valid"), WRONG)
def test_wrong_return_names_policy_and_chunk(verb, value, error, valid):
    """The processors are restored, and the next call equals a first call."""
    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    with pytest.raises(error, match=f"`chunk 1: Wrong.{verb}` must be .*{valid}"):
        roll(pipe, noise(3, 2), method=["tokentrim", Wrong(verb, value)])
    assert processors(pipe.transformer) == before
    assert torch.equal(roll(pipe, noise(3)).frames, roll(latent_pipeline(), noise(3)).frames)


@pytest.mark.parametrize("verb", ["observe", "review", "commit", "close", "prompt_changed"])
def test_error_in_a_policy_propagates_and_restores_processors(verb):
    class Broken(ContextPolicy):
        pass

    def fail(self, *_):
        raise ZeroDivisionError(verb)

    setattr(Broken, verb, fail)
    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    with pytest.raises(ZeroDivisionError, match=verb):
        roll(
            pipe,
            noise(3),
            method=[Broken()],
            video_latents=noise(1, seed=5).transpose(1, 2),
            callback_on_step_end=lambda *_: {"prompt_embeds": embeds(seed=3)},
        )
    assert processors(pipe.transformer) == before
