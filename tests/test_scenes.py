"""A new prompt or a cut begins a new scene: statistics and warm-ups start again, and holding resumes on the new scene."""

import pytest
import torch
from builders import CHANNELS, CHUNK, HEIGHT, WIDTH, embeds, latent_pipeline, noise, randn, steady_noise

from tokentrim import Quarantine, Reanchor
from tokentrim.tokentrim_policies.trim import TokenTrim


CHANGE = 6  # the chunk at which the prompt changes
NUM_CHUNKS = 16
PATIENCE = 3
PLUS = {"quarantine": {"sensitivity": 6.0}, "reanchor": {"match": "moments", "patience": PATIENCE}}


def chunk(shift: float, seed: int = 0) -> torch.Tensor:
    """Latents of one video, (C, T, H, W)."""
    return randn(CHANNELS, CHUNK, HEIGHT, WIDTH, seed=seed) + shift


def play(policy, shifts):
    """Which chunks of a video are rejected, the values of each shifted by so much against the first one's."""
    entered = []
    for shift in shifts:
        entered.append(policy.commit(chunk(shift)) is not None)
        policy.close(entered[-1])
    return [index for index, enters in enumerate(entered) if not enters]


# Quarantine


def test_jump_after_a_prompt_change_is_accepted():
    policy = Quarantine()
    assert play(policy, [0.01 * index for index in range(6)]) == []
    policy.prompt_changed()
    assert play(policy, [5.0]) == [] and policy.jumps == []


def test_lively_scene_is_judged_by_its_own_jumps():
    calm, lively = [0.01 * index for index in range(6)], [5.0 + index for index in range(8)]
    policy = Quarantine()
    assert play(policy, calm) == []
    policy.prompt_changed()
    assert play(policy, lively) == []
    assert play(policy, [99.0]) == [0]
    assert play(Quarantine(), [*calm, *lively])  # without a change of prompt


def test_a_calm_scene_after_a_lively_one_has_its_own_threshold():
    """A defect that the old scene's jumps would hide is rejected, after the warm-up of four jumps and not before."""
    policy = Quarantine()
    assert play(policy, [float(index) for index in range(6)]) == []
    policy.prompt_changed()
    assert play(policy, [20.0, 20.01, 20.02, 20.03, 21.0, 20.03]) == []
    policy.prompt_changed()
    assert play(policy, [20.0, 20.01, 20.02, 20.03, 20.04, 21.0, 20.04]) == [5]


def test_a_chunk_after_a_rejected_one_may_be_rejected_in_a_new_scene():
    policy = Quarantine()
    assert play(policy, [*(0.01 * index for index in range(6)), 9.0]) == [6] and policy.rejected
    policy.prompt_changed()
    assert not policy.rejected


# TokenTrim


def test_the_gate_closes_at_a_change_and_opens_after_the_warm_up_of_the_new_scene():
    policy = TokenTrim(warmup_chunks=2, drift_sensitivity=0.0)
    thresholds = []
    for index in range(10):
        if index == 5:
            policy.prompt_changed()
        policy.review(chunk(0.1 * index, seed=index))
        thresholds.append(policy.close(True).get("threshold"))
    assert [threshold is not None for threshold in thresholds] == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2


# Re-anchoring


def outcomes(policy, shifts, seeds=None):
    values = []
    for number, shift in enumerate(shifts):
        policy.commit(chunk(shift, seed=seeds[number] if seeds else 0))
        values.append(policy.close(True)["reanchored"])
    return values


@pytest.mark.parametrize("tolerance", [None, 0.2])
@pytest.mark.parametrize("step", [0.0, 0.01, 0.3, 1.0])
def test_holding_resumes_after_the_patience(step, tolerance):
    policy = Reanchor("mean", tolerance, PATIENCE)
    assert outcomes(policy, [0.0, 0.0, 0.0]) == [None, "held", "held"]
    policy.prompt_changed()
    assert outcomes(policy, [5.0 + step * index for index in range(PATIENCE)]) == ["watched"] * PATIENCE
    assert outcomes(policy, [5.0 + step * PATIENCE]) == ["held"]


@pytest.mark.parametrize("tolerance", [None, 0.2])
@pytest.mark.parametrize("shift", [0.0, 0.1, 5.0])
def test_the_reference_is_taken_from_the_new_scene(shift, tolerance):
    """Also where the new scene is as near to the old reference as the tolerance."""
    policy = Reanchor("mean", tolerance, PATIENCE)
    outcomes(policy, [0.0, 0.0])
    policy.prompt_changed()
    new = [chunk(shift, seed=number + 1) for number in range(PATIENCE)]
    for each in new:
        assert policy.commit(each) is each
        policy.close(True)
    policy.commit(chunk(shift, seed=9))
    assert policy.close(True) == {"reanchored": "held"}
    assert any(torch.equal(policy.reference, each) for each in new)


def test_a_second_change_begins_the_patience_again():
    policy = Reanchor("mean", 0.2, PATIENCE)
    outcomes(policy, [0.0, 0.0])
    policy.prompt_changed()
    assert outcomes(policy, [5.0, 5.5]) == ["watched"] * 2
    policy.prompt_changed()
    assert outcomes(policy, [9.0, 9.5, 10.0, 10.5]) == ["watched"] * 3 + ["held"]


def test_a_new_scene_that_is_held_can_be_released_on_the_same_terms():
    policy = Reanchor("mean", 0.2, PATIENCE)
    outcomes(policy, [0.0, 0.0])
    policy.prompt_changed()
    outcomes(policy, [5.0] * PATIENCE)
    released = outcomes(policy, [5.0 + 0.5 * index for index in range(1, 9)])
    assert released == ["held"] * (PATIENCE - 1) + ["watched"] * (9 - PATIENCE)  # no patience ends that


def test_given_frames_end_the_patience():
    """Frames that are given are beyond doubt: the video is held to them at once."""
    policy = Reanchor("mean", 0.2, PATIENCE)
    outcomes(policy, [0.0])
    policy.prompt_changed()
    outcomes(policy, [5.0])
    policy.observe(chunk(7.0))
    assert outcomes(policy, [7.1, 7.1]) == ["held"] * 2


# In the rollout


def scene_call(method=PLUS, batch=1, num_chunks=NUM_CHUNKS, lively=4.0, **settings):
    """Noise that is nearly the same in every chunk of a scene, and moves more in the new one."""
    latents = steady_noise(num_chunks, [num_chunks] * batch)
    latents[:, :, CHANGE * CHUNK :] = noise(1, batch, seed=5).repeat(1, 1, num_chunks - CHANGE, 1, 1) * 1.5
    latents[:, :, CHANGE * CHUNK :] += 0.05 * lively * noise(num_chunks - CHANGE, batch, seed=6)
    call = {"prompt_embeds": embeds(1).repeat(batch, 1, 1), "latents": latents, "num_inference_steps": 2}
    return {**call, "method": method, "output_type": "latent", "window_size": 12, "num_sink_frames": 3, **settings}


def facts(decisions, name):
    return [decision.get(name) for decision in decisions]


SCENES = {
    "another prompt": {"prompt_schedule": {CHANGE: embeds(seed=8)}},
    "a cut": {"prompt_schedule": {CHANGE: embeds(seed=8)}, "prompt_transition": "cut"},
    "a cut to the same prompt": {"prompt_schedule": {CHANGE: embeds()}, "prompt_transition": "cut"},
    "flush": {"prompt_schedule": {CHANGE: embeds(seed=8)}, "prompt_transition": "flush"},
    "recache": {"prompt_schedule": {CHANGE: embeds(seed=8)}, "prompt_transition": "recache"},
    "rolling": {"prompt_schedule": {CHANGE: embeds(seed=8)}, "rollout": "rolling_forcing"},
}


@pytest.mark.parametrize("scene", SCENES)
def test_new_scene_is_not_judged_by_the_old_one(scene):
    """The second chunk of the new scene used to be thrown out of the context."""
    (decisions,) = latent_pipeline()(**scene_call(**SCENES[scene])).decisions
    expected = [None, *["held"] * (CHANGE - 1), *["watched"] * PATIENCE]
    assert facts(decisions, "reanchored")[: CHANGE + PATIENCE] == expected
    assert facts(decisions, "reanchored")[CHANGE + PATIENCE] == "held"
    assert not any(facts(decisions, "quarantined"))
    assert [index for index, changed in enumerate(facts(decisions, "prompt_changed")) if changed] == [CHANGE]


def test_without_a_change_of_prompt_the_same_noise_is_quarantined():
    """What the tests above would find if the statistics went on."""
    (decisions,) = latent_pipeline()(**scene_call()).decisions
    assert any(facts(decisions, "quarantined")[CHANGE:]) and not any(facts(decisions, "prompt_changed"))


def test_a_video_of_a_batch_whose_prompt_stays_keeps_its_scene():
    """`None` in a change: its statistics and its reference go on."""
    call = scene_call(batch=2, prompt_schedule={CHANGE: embeds(2, seed=8)})
    (both, one) = (
        latent_pipeline()(**call).decisions,
        latent_pipeline()(**{**call, "prompt_schedule": {CHANGE: torch.cat([embeds(1, seed=8), embeds()])}}).decisions,
    )
    changed = [
        [CHANGE in [i for i, each in enumerate(facts(video, "prompt_changed")) if each] for video in run]
        for run in (both, one)
    ]
    assert changed == [[True, True], [True, False]]
    assert facts(one[1], "reanchored")[CHANGE] != "watched" == facts(one[0], "reanchored")[CHANGE]


def test_blending_is_over_before_the_new_scene_counts():
    call = scene_call(prompt_schedule={CHANGE: embeds(seed=8)}, blend_chunks=2)
    (decisions,) = latent_pipeline()(**call).decisions
    assert facts(decisions, "reanchored")[CHANGE : CHANGE + 2 + PATIENCE + 1] == ["watched"] * (2 + PATIENCE) + [
        "held"
    ]
    assert [i for i, changed in enumerate(facts(decisions, "prompt_changed")) if changed] == [
        CHANGE,
        CHANGE + 1,
        CHANGE + 2,
    ]


@pytest.mark.parametrize("transition", ["keep", "cut"])
def test_steered_stream_equals_a_schedule(transition):
    schedule = {"prompt_schedule": {CHANGE: embeds(seed=8)}, "prompt_transition": transition}
    (expected,) = latent_pipeline()(**scene_call(**schedule)).decisions
    decisions = []
    with latent_pipeline().stream(**scene_call()) as stream:
        for each in stream:
            decisions += each.decisions
            if each.index == CHANGE - 1:
                stream.set_prompt(embeds(seed=8), transition)
    assert decisions == expected


@pytest.mark.parametrize("after", range(1, PATIENCE + 2))
def test_a_run_resumes_inside_the_patience(after, tmp_path):
    call = scene_call(**SCENES["a cut"])
    whole = latent_pipeline()(**call)
    with latent_pipeline().stream(**call, state_dir=tmp_path) as stream:
        for _ in range(CHANGE + after):
            next(stream)
        stream.save_state()
    with latent_pipeline().resume(tmp_path) as stream:
        chunks = list(stream)
    assert [chunk.decisions[0] for chunk in chunks] == whole.decisions[0][CHANGE + after :]
    assert torch.equal(
        torch.cat([chunk.latents for chunk in chunks], 2), whole.frames[:, :, (CHANGE + after) * CHUNK :]
    )
