"""Re-anchoring: the context is held to the first chunk, unless a change is intended."""

import pytest
import torch
from builders import CHANNELS, CHUNK, GRID, HEIGHT, WIDTH, embeds, latent_pipeline, noise, randn, roll

from research.evaluation.rollouts import draw_noise, load_pipeline
from tokentrim import ContextPolicy, Reanchor
from tokentrim.tokentrim_policies.chain import ContextPolicies
from tokentrim.tokentrim_policies.matching import MATCHINGS, MatchMoments


WHOLE = sorted(set(MATCHINGS) - {"near", "shift"})  # those that hold all that is in a chunk


def video(seed: int, shift: float = 0.0, num_frames: int = CHUNK) -> torch.Tensor:
    return randn(CHANNELS, num_frames, HEIGHT, WIDTH, seed=seed) + shift


def steady(*offsets: float) -> list[torch.Tensor]:
    """Chunks of one video, at these distances from the first, in standard deviations."""
    first = video(0)
    return [first + each * first.std((1, 2, 3), keepdim=True) for each in (0.0, *offsets)]


def is_held(policy: Reanchor, chunks: list[torch.Tensor]) -> list[bool]:
    """Whether each chunk enters the context changed. Its decision agrees; a watched chunk is not changed."""
    held = []
    for chunk in chunks:
        is_first = policy.reference is None
        context = policy.commit(chunk)
        held.append(not torch.allclose(context, chunk, atol=1e-5))
        outcome = policy.close(True)["reanchored"]
        is_reference = policy.reference is chunk  # where it has just settled, it is held to itself
        assert outcome == (
            None if is_first else "held" if held[-1] or (is_reference and not policy.watched) else "watched"
        )
        assert outcome == "held" or context is chunk
    return held


# The policy


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_strength_scales_how_far_a_held_chunk_moves(strength):
    policy, (first, second) = Reanchor("covariance", strength=strength), (video(0), video(1, 0.5))
    policy.commit(first)
    matched = MATCHINGS["covariance"](first)(second)
    torch.testing.assert_close(policy.commit(second), second + strength * (matched - second), atol=1e-6, rtol=0)
    assert policy.close(True) == {"reanchored": "held"}


def test_drift_is_held_and_a_change_is_held_after_it_settles():
    drift = steady(*[0.15] * 40)
    assert (
        is_held(Reanchor("mean", 0.2, 3), drift) == is_held(Reanchor("mean", None, 3), drift) == [False] + [True] * 40
    )
    # Resists with 0.3 and 0.31; moves until 1.2; settled three chunks later.
    change = steady(0.1, 0.3, 0.31, 0.32, 0.6, 0.9, 1.2, 1.21, 1.22, 1.23, 1.24)
    policy = Reanchor("mean", 0.2, 3)
    assert is_held(policy, change) == [False] + [True] * 2 + [False] * 7 + [True] * 2
    torch.testing.assert_close(policy.commit(change[-1]), change[7], atol=1e-5, rtol=0)


def test_video_without_early_change_is_held_for_good():
    late = steady(0.1, 0.11, 0.12, *[0.3 * index for index in range(1, 20)])
    policy = Reanchor("mean", 0.2, 3)
    assert is_held(policy, late) == [False] + [True] * 22
    policy.prompt_changed()
    assert is_held(policy, steady(6.0, 6.01, 6.02, 6.03)[1:]) == [False] * 3 + [True]


def test_a_change_from_the_start_is_released_after_the_patience():
    change = steady(*[0.3 * index for index in range(1, 20)])
    assert is_held(Reanchor("mean", 0.2, 3), change) == [False, True, True] + [False] * 17


def test_one_chunk_far_away_releases_nothing():
    chunks = steady(0.1, 0.11, 0.12, 0.9, 0.1, 0.12, 0.9, 0.11)
    assert is_held(Reanchor("mean", 0.2, 3), chunks) == [False] + [True] * 8


class Reject(ContextPolicy):
    """Rejects the chunks of some indices."""

    def __init__(self, rejected):
        self.rejected, self.index = list(rejected), -1

    def commit(self, chunk):
        self.index += 1
        return None if self.index in self.rejected else chunk


@pytest.mark.parametrize(("rejected", "reference"), [([2, 3, 4], 0), ([], -1)], ids=["rejected", "entered"])
def test_rejected_chunk_does_not_count_as_change(rejected, reference):
    """Behind a policy that rejects them, defects are not watched; without it, the reference follows them."""
    chunks = steady(0.1, 3.0, 3.0, 3.0, 0.1, 0.12, 0.13)
    policies = ContextPolicies([Reject(rejected), Reanchor("mean", 0.2, 3)], 1, GRID)
    for index, chunk in enumerate(chunks):
        context = policies.commit(chunk[None])[0]
        decision = policies.close()[0]
        assert decision["quarantined"] == (index in rejected)
        assert (decision["reanchored"] is None) == (index in [0, *rejected])
    torch.testing.assert_close(context, chunks[reference], atol=1e-5, rtol=0)


def test_rejected_first_chunk_is_not_the_reference():
    policies = ContextPolicies([Reject([0]), Reanchor("moments")], 1, GRID)
    for seed in range(3):
        context = policies.commit(video(seed)[None])[0]
        policies.close()
    torch.testing.assert_close(context, MatchMoments(video(1))(video(2)))


def test_videos_of_a_batch_are_held_separately():
    policies = ContextPolicies([Reanchor("moments", 0.2, 2)], 2, GRID)
    for quiet, loud in zip(steady(*[0.1] * 3), steady(0.5, 1.0, 1.5)):
        context = policies.commit(torch.stack([quiet, loud]))
        decisions = policies.close()
    torch.testing.assert_close(context[0], video(0), atol=1e-5, rtol=0)
    assert torch.equal(context[1], loud)
    assert [decision["reanchored"] for decision in decisions] == ["held", "watched"]


@pytest.mark.parametrize("pace", [0.05, 0.3, 3.0])
def test_only_a_prompt_releases_by_default(pace):
    """However fast the chunks move away."""
    policy, chunks = Reanchor("mean"), steady(*[pace * index for index in range(1, 30)])
    assert is_held(policy, chunks[:20]) == [False] + [True] * 19
    policy.prompt_changed()
    assert is_held(policy, chunks[20:]) == [False] * 6 + [True] * 4
    assert policy.reference is chunks[25]  # the last that passed


@pytest.mark.parametrize(("tolerance", "settled"), [(None, 7), (0.2, 5)])
def test_video_is_held_again_after_a_prompt_change(tolerance, settled):
    """At the last chunk of the patience, or with a tolerance, at the first of those that stayed within it."""
    policy, chunks = Reanchor("mean", tolerance, 3), steady(0.1, 0.11, 0.12, 0.13, 0.8, 0.81, 0.82, 0.83, 0.84)
    assert is_held(policy, chunks[:5]) == [False] + [True] * 4
    policy.prompt_changed()
    assert is_held(policy, chunks[5:]) == [False] * 3 + [True] * 2
    torch.testing.assert_close(policy.commit(chunks[-1]), chunks[settled], atol=1e-5, rtol=0)


def test_near_leaves_sudden_content_alone():
    """Only values near the reference count as resisting: the sky stays, whatever enters the picture."""
    sky, both = 0.1 * video(0), torch.cat([0.1 * video(0), 0.1 * video(1, shift=50.0)], dim=2)
    policy = Reanchor("near", 0.05, 2)
    policy.commit(sky)
    for _ in range(4):
        context = policy.commit(both + 0.04)
        assert policy.close(True) == {"reanchored": "held"}
    torch.testing.assert_close(context[:, :, HEIGHT:], both[:, :, HEIGHT:] + 0.04, atol=1e-5, rtol=0)
    assert (context - both)[:, :, :HEIGHT].mean().abs() < 0.02


def test_a_change_of_prompt_before_the_first_chunk_changes_nothing():
    policy = Reanchor("mean")
    policy.prompt_changed()
    assert is_held(policy, steady(0.1, 0.2)) == [False, True, True]


@pytest.mark.parametrize("kind", WHOLE)
def test_references_of_a_batch_may_be_of_different_lengths(kind):
    """FAR begins with a chunk of one frame; the released video is later held to a longer one."""
    policies = ContextPolicies([Reanchor(kind, 1.0, 1)], 2, GRID)
    policies.commit(torch.stack([video(0, num_frames=1), video(1, num_frames=1)]))
    second = torch.stack([video(2), video(3, shift=2.0)])
    assert torch.equal(policies.commit(second)[1], second[1])
    policies.commit(second)  # settled
    third = torch.stack([video(5), video(5, shift=2.0)])
    context = policies.commit(third)
    torch.testing.assert_close(context[0], MATCHINGS[kind](video(0, num_frames=1))(third[0]))
    torch.testing.assert_close(context[1], MATCHINGS[kind](second[1])(third[1]))


def test_derived_state_is_not_saved():
    """A matching is computed again from the reference."""
    one, other = (ContextPolicies([Reanchor()], 1, GRID) for _ in range(2))
    for seed in range(2):
        one.commit(video(seed)[None])
        one.close()
    state = one.state_dict()
    ((_, attributes),) = state["chains"][0]
    assert "reference" in attributes and not [name for name in attributes if name.startswith("_")]
    other.load_state_dict(state)
    assert torch.equal(one.commit(video(5)[None]), other.commit(video(5)[None]))
    assert one.close() == other.close()


# In the rollout


def reanchor(match: str, **settings) -> dict:
    """TokenTrim that trims, with its context held."""
    return {"method": {"tokentrim": {}, "reanchor": {"match": match, **settings}}}


def outcomes(output, index: int = 0) -> list[str | None]:
    return [decision["reanchored"] for decision in output.decisions[index]]


class Record(ContextPolicy):
    """Behind another policy: records whether its chunk differs from the generated one."""

    def __init__(self):
        self.draft, self.changed = None, None

    def review(self, draft):
        self.draft = draft
        return ()

    def commit(self, chunk):
        self.changed = not torch.allclose(chunk, self.draft, atol=1e-5)
        return chunk

    def close(self, entered):
        changed, self.changed = self.changed, None
        return {"changed": changed}


def test_prompt_change_in_a_callback_stops_holding():
    """In chunk 3: the next two chunks are not changed; without the callback they are. The last is not committed."""
    latents, calls = noise(7), []

    def change(pipe, step, timestep, tensors):
        calls.append(step)
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if len(calls) == 2 * 3 + 1 else {}

    def same(pipe, step, timestep, tensors):
        calls.append(step)
        return {"prompt_embeds": tensors["prompt_embeds"]}

    for callback, changed, reanchored in (
        (
            change,
            [False, True, True, False, False, True, None],
            [None, "held", "held", "watched", "watched", "held", None],
        ),
        (same, [False, *[True] * 5, None], [None, *["held"] * 5, None]),
    ):
        calls.clear()
        output = roll(
            latent_pipeline(),
            latents,
            method=[Reanchor("mean", None, 2), Record()],
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        assert [decision["changed"] for decision in output.decisions[0]] == changed
        assert outcomes(output) == reanchored


def test_off_by_default():
    pipe, latents = latent_pipeline(), noise(4)
    default = roll(pipe, latents)
    assert outcomes(default) == [None] * 4
    assert torch.equal(default.frames, roll(pipe, latents, method="tokentrim").frames)
    assert not torch.equal(default.frames, roll(pipe, latents, **reanchor("mean")).frames)


@pytest.mark.parametrize("kind", sorted(MATCHINGS))
def test_later_chunks_read_the_held_chunk_and_the_video_shows_the_generated_one(kind):
    """Equals continuing from the first chunk and the held second one."""
    latents = noise(3)
    plain, held = roll(latent_pipeline(), latents).frames, roll(latent_pipeline(), latents, **reanchor(kind)).frames
    assert torch.equal(held[:, :, : 2 * CHUNK], plain[:, :, : 2 * CHUNK])
    first, second, third = held.split(CHUNK, dim=2)
    context = torch.cat([first, MATCHINGS[kind](first[0])(second[0])[None]], dim=2)
    continued = roll(latent_pipeline(), latents, video_latents=context.transpose(1, 2)).frames
    torch.testing.assert_close(third, continued[:, :, 2 * CHUNK :], atol=1e-5, rtol=0)
    assert not torch.allclose(third, plain[:, :, 2 * CHUNK :], atol=1e-3)


def test_last_given_chunk_is_the_reference():
    latents, given = noise(4), noise(2, seed=5)
    plain, held = (
        roll(latent_pipeline(), latents, video_latents=given.transpose(1, 2), **settings)
        for settings in ({}, reanchor("moments"))
    )
    assert outcomes(held) == [None, None, "held", None]
    plain, held = plain.frames, held.frames
    assert torch.equal(held[:, :, : 3 * CHUNK], plain[:, :, : 3 * CHUNK])
    third, last = held[:, :, 2 * CHUNK : 3 * CHUNK], given[:, :, CHUNK:]
    context = torch.cat([given, MatchMoments(last[0])(third[0])[None]], dim=2)
    continued = roll(latent_pipeline(), latents, video_latents=context.transpose(1, 2)).frames
    torch.testing.assert_close(held[:, :, 3 * CHUNK :], continued[:, :, 3 * CHUNK :], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("match", ["near", "distribution", "covariance"])
def test_rounding_hardly_changes_a_held_video(match):
    """On the trained world, ten held chunks: noise that differs by a millionth, and a batch instead of one video."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    latents, prompts = draw_noise(pipe, [5, 6], 33), ["a red circle moving right over a blue background"] * 2

    def held(latents):
        method = {"reanchor": {"match": match, "tolerance": None}}
        prompt = prompts[: len(latents)]
        return pipe(prompt, latents=latents, num_frames=33, output_type="latent", method=method).frames

    video = held(latents[:1])
    assert (held(latents[:1] * (1 + 1e-6)) - video).abs().max() < 1e-3
    assert (held(latents)[:1] - video).abs().max() < 1e-3


@pytest.mark.parametrize("rollout", ["self_forcing", "rolling_forcing"])
def test_a_batch_equals_single_runs(rollout):
    latents, text = noise(5, 2), embeds(2)
    settings = {"rollout": rollout, "window_size": 12, **reanchor("histogram", patience=1, tolerance=0.6)}
    batch = roll(latent_pipeline(), latents, prompt_embeds=text, **settings)
    for index in range(2):
        single = roll(latent_pipeline(), latents[[index]], prompt_embeds=text[[index]], **settings)
        torch.testing.assert_close(batch.frames[[index]], single.frames, atol=1e-5, rtol=0)
        assert outcomes(batch, index) == outcomes(single)


def test_a_tolerance_lets_a_change_through():
    latents = noise(4)
    latents[:, :, CHUNK:] += 3
    plain, held, tolerant = (
        roll(latent_pipeline(), latents, **settings).frames[:, :, 3 * CHUNK :]
        for settings in ({}, reanchor("moments", tolerance=None), reanchor("moments", patience=1, tolerance=0.3))
    )
    assert (tolerant - plain).abs().mean() < 0.5 * (held - plain).abs().mean()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"match": "median"}, ValueError, "`match` .*'histogram'.*'median'"),
        ({"match": True}, TypeError, "`match` .*'mean'.*True"),
        ({"tolerance": 0}, ValueError, "`tolerance` .*> 0.*0"),
        ({"tolerance": "1"}, TypeError, "`tolerance` .*> 0.*'1'"),
        ({"patience": 0}, ValueError, "`patience` .*>= 1.*0"),
        ({"patience": 1.5}, TypeError, "`patience` .*>= 1.*1.5"),
        ({"strength": 1.1}, ValueError, "`strength` .*from 0 to 1.*1.1"),
        ({"strength": None}, TypeError, "`strength` .*None"),
        ({"force": 1.0}, ValueError, "'match', 'tolerance', 'patience'.*'force'"),
    ],
)
def test_bad_input_raises(settings, error, message):
    """The message names the policy and the setting."""
    with pytest.raises(error, match=f"'reanchor'.*{message}"):
        roll(latent_pipeline(), noise(2), method={"reanchor": settings})
