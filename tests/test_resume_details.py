"""A state holds all that a run depends on, as copies: each part is loaded into a run of the same call that lacks it."""

import copy

import pytest
import torch
from builders import embeds, far_noise, far_pipeline, generators, latent_pipeline, noise
from contract import EAGER

from tokentrim import ContextPolicy
from tokentrim.tokentrim_files.run_state import fingerprint, load_state, recall, save_state


def begun(pipe=None, **call):
    pipe = latent_pipeline() if pipe is None else pipe
    call = {"latents": noise(7), "prompt_embeds": embeds(), "output_type": "latent", "num_inference_steps": 2, **call}
    return pipe.begin(pipe.plan(**{"method": "plain", **call}))


def rolled(run, num_chunks):
    """After some chunks, of which it returns the latents."""
    chunks = run.pipe.roll_out(run)
    latents = [next(chunks).latents for _ in range(num_chunks)]
    chunks.close()
    return latents


def rest(run):
    return torch.cat([chunk.latents for chunk in run.pipe.roll_out(run)], dim=2)


def test_given_frames_that_are_left_are_those_of_the_state():
    ours, other = (begun(video_latents=noise(3, seed=seed).transpose(1, 2)) for seed in (4, 5))
    rolled(ours, 1)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(rest(other), rest(ours))


@pytest.mark.parametrize("transition", ["keep", "recache", "flush", "cut"])
@pytest.mark.parametrize("num_more", [0, 1, 2, 3])
def test_prompt_that_is_due_and_its_transition_are_restored(num_more, transition):
    """Set in a run after two chunks, blended over two; saved before, in and behind the change."""
    ours, other = begun(), begun()
    rolled(ours, 2)
    ours.change_prompt(embeds(seed=8), transition, 2)
    rolled(ours, num_more)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(rest(other), rest(ours))


def test_negative_prompt_is_restored():
    ours, other = (begun(guidance_scale=2.0, negative_prompt_embeds=embeds(seed=seed)) for seed in (8, 9))
    rolled(ours, 1)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(rest(other), rest(ours))


def test_noise_that_was_drawn_is_restored_and_no_more_is_drawn_than_before():
    """Rolling Forcing has drawn the noise of the chunks in flight."""
    call = {"latents": None, "num_frames": 81, "height": 32, "width": 48, "num_inference_steps": 3}
    ours, other = (begun(**call, rollout="rolling_forcing", generator=generators(seed)[0]) for seed in (1, 2))
    rolled(ours, 2)
    state = copy.deepcopy(ours.state_dict())
    assert state["num_drawn"] == 4 and [index for index, _ in state["noise"]] == [2, 3]
    other.load_state_dict(state)
    assert torch.equal(rest(other), rest(ours))


def test_state_with_another_number_of_generators_is_refused():
    batch = {"latents": noise(3, 2), "prompt_embeds": embeds(2)}
    one, two = begun(**batch, generator=generators(0)[0]), begun(**batch, generator=generators(0, 1))
    with pytest.raises(ValueError, match="`state` must be of a run of the same call, with 4 generators, but is 3"):
        two.load_state_dict(one.state_dict())
    recalled = recall({"values": {"generator": ["cpu", "cpu"]}, "objects": []}, {})["generator"]
    assert len(recalled) == 2 and recalled[0] is not recalled[1]


def test_state_is_a_copy_of_the_noise():
    run = begun()
    rolled(run, 1)
    state = run.state_dict()
    before = copy.deepcopy(state["noise"])
    for chunk in run.noise.chunks.values():
        chunk.zero_()
    assert all(torch.equal(now, then) for (_, now), (_, then) in zip(state["noise"], before, strict=True))


def test_tensors_of_a_loaded_state_are_copies_wherever_they_lie_in_the_file(tmp_path):
    """Where a tensor begins decides the last bits of a matrix product."""
    tensors = [
        torch.ones(size, dtype=dtype) for size, dtype in ((3, torch.int8), (5, torch.bfloat16), (7, torch.float32))
    ]
    save_state(tmp_path, 0, {"tensors": tensors})
    loaded = load_state(tmp_path)["tensors"]
    assert all(torch.equal(one, other) and one.data_ptr() % 64 == 0 for one, other in zip(loaded, tensors))


def test_run_is_checked_for_nan_before_it_is_saved(monkeypatch):
    run = begun()
    rolled(run, 1)

    def not_finite():
        raise RuntimeError("not finite")

    monkeypatch.setattr(run.denoiser, "check_finite", not_finite)
    with pytest.raises(RuntimeError, match="not finite"):
        run.state_dict()


def test_fingerprint_looks_at_all_of_a_weight_and_at_names():
    weight = torch.zeros(20000)
    changed = weight.clone()
    changed[10000:] = 1

    def module(**weights):
        made = torch.nn.Module()
        for name, each in weights.items():
            made.register_buffer(name, each)
        return made

    prints = [
        fingerprint(each) for each in (module(a=weight), module(a=changed), module(b=weight), module(a=weight[:100]))
    ]
    assert len(set(prints)) == 4 and fingerprint(module(a=weight.clone())) == prints[0]


# AnyFlow-FAR


def far_run(**call):
    latents, partition = far_noise(14, seed=3), [1, 2, 2, 2, 2, 2, 2, 1]
    return begun(
        far_pipeline(), latents=latents, chunk_partition=partition, **{**EAGER, "method": "tokentrim", **call}
    )


@pytest.mark.parametrize("cut", range(1, 8))
def test_far_evictions_and_chunks_are_saved(cut):
    """Also those of tokens that a compressed one has not lost yet; going on changes no state, loading shares none."""
    ours, other = far_run(), far_run()
    rolled(ours, cut)
    state = ours.state_dict()
    kept = copy.deepcopy(state)
    expected = rest(ours)
    for run in (other, ours, other):
        run.load_state_dict(state)
        assert torch.equal(rest(run), expected)
    for (frame, now), (known, then) in zip(state["backbone"]["evicted"], kept["backbone"]["evicted"], strict=True):
        assert frame == known and torch.equal(now, then)


def test_far_forgets_evictions_of_frames_that_left():
    run = far_run(window_size=8)
    for _ in run.pipe.roll_out(run):
        backbone = run.backbone
        held = {*backbone.cache.frames, *sum(backbone.full_chunks, [])}
        assert len(backbone.evicted) <= len(held) + 2  # the next chunk has not made room yet
    assert min(backbone.evicted) > 0


def test_far_refuses_weights():
    run = far_run()
    rolled(run, 2)
    with pytest.raises(ValueError, match="`prune_weight` must be 0 for AnyFlow-FAR"):
        run.backbone.evict({0: [1]}, weight=0.5)


class RejectsTheSecond(ContextPolicy):
    """Of its commits."""

    may_reject = True

    def __init__(self):
        self.number = 0

    def commit(self, chunk):
        self.number += 1
        return None if self.number == 2 else chunk


def test_rejection_on_far_leaves_the_rest_of_the_context():
    run = begun(far_pipeline(), latents=far_noise(7), chunk_partition=[1, 2, 2, 2], method=RejectsTheSecond())
    rolled(run, 2)
    evicted = run.backbone.evicted
    assert not evicted[0].any() and evicted[1].all() and evicted[2].all()
