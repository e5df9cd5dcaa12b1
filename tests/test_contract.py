"""Rules for every method on every rollout, and for a ten-line policy and layout in a user's script."""

import json

import pytest
import torch
from builders import CHUNK, embeds, far_pipeline, latent_pipeline, steady_noise, tiny_far
from contract import METHODS, ROLLOUTS, runs


both = pytest.mark.parametrize(
    ("method", "rollout"), [(method, rollout) for method in METHODS for rollout in ROLLOUTS if runs(method, rollout)]
)


def roll_out(rollout, latents, prompts, **settings):
    make_pipe, arguments = ROLLOUTS[rollout]
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments, **settings}
    return make_pipe()(latents=latents, prompt_embeds=prompts, **arguments)


@both
def test_a_batch_equals_its_single_runs(method, rollout):
    latents, prompts = steady_noise(9, [3, 6]), embeds(2)
    batch = roll_out(rollout, latents, prompts, **METHODS[method])
    for video in range(2):
        rows = slice(video, video + 1)
        single = roll_out(rollout, latents[rows], prompts[rows], **METHODS[method])
        torch.testing.assert_close(batch.frames[rows], single.frames, atol=5e-3, rtol=0)
        for together, alone in zip(batch.decisions[video], single.decisions[0], strict=True):
            for name in ("trim", "tokens", "quarantined", "reanchored"):
                assert together[name] == alone[name], name


@both
def test_decisions_are_json_with_the_same_names_for_every_method(method, rollout):
    decisions = roll_out(rollout, steady_noise(5, [3]), embeds(), **METHODS[method]).decisions
    assert json.loads(json.dumps(decisions, allow_nan=False)) == decisions
    names = {"chunk", "severity", "threshold", "trim", "tokens", "regenerated_severity"}
    assert all(set(each) == names | {"quarantined", "reanchored"} for each in decisions[0])
    assert [each["chunk"] for each in decisions[0]] == list(range(5))


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_ten_line_policy_fulfills_the_contract(rollout):
    """It brightens the context, evicts a token of every draft, and reports."""
    pipe = ROLLOUTS[rollout][0]()

    class Mine(pipe.ContextPolicy):
        def review(self, draft):
            return [self.video]

        def commit(self, chunk):
            return chunk + 0.5

        def close(self, entered):
            return {"mine": self.video}

    latents, prompts = steady_noise(6, [3, 4]), embeds(2)
    plain = roll_out(rollout, latents, prompts, method="plain")
    output = roll_out(rollout, latents, prompts, method=Mine())
    assert torch.equal(output.frames[:, :, :CHUNK], plain.frames[:, :, :CHUNK])  # nothing was read yet
    assert not torch.allclose(output.frames[:, :, CHUNK:], plain.frames[:, :, CHUNK:], atol=1e-3)
    for video, decisions in enumerate(output.decisions):
        assert all(each["mine"] == video for each in decisions)
        first = 2 if rollout == "rolling_forcing" else 1  # with context to evict: not the sink, the first chunk
        assert not any(each["trim"] for each in decisions[:first])
        assert all(each["trim"] and each["tokens"] == [video] for each in decisions[first:])


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_ten_line_layout_fulfills_the_contract(rollout):
    """It keeps the first frame and the newest eleven, counted inside the window."""
    pipe = ROLLOUTS[rollout][0]()

    class First(pipe.Layout):
        num_sink_frames = 1

        def keep(self, held, new):
            return held[:1] + held[1:][-11:]

        def view(self, held, new, pass_):
            slots = list(range(len(held) + len(new)))
            return pipe.View(held, slots[: len(held)], slots[len(held) :])

    latents, prompts = steady_noise(8, [3, 4]), embeds(2)
    settings = {name: None for name in ("window_size",) if name in ROLLOUTS[rollout][1]}
    plain = roll_out(rollout, latents, prompts, method="plain", **settings)
    output = roll_out(rollout, latents, prompts, method="plain", layout=First(), **settings)
    assert torch.isfinite(output.frames).all()
    assert not torch.allclose(output.frames, plain.frames, atol=1e-3)
    trimmed = roll_out(rollout, latents, prompts, layout=First(), **settings, **METHODS["tokentrim"])
    assert any(each["trim"] for each in trimmed.decisions[0])


def test_a_layout_that_keeps_everything_changes_no_bit():
    for make_pipe in (latent_pipeline, lambda: far_pipeline(tiny_far(chunk_partition=(CHUNK,)))):
        arguments = {"latents": steady_noise(5, [3]), "prompt_embeds": embeds(), "output_type": "latent"}
        default, base = (
            make_pipe()(num_inference_steps=2, layout=layout, **arguments) for layout in (None, make_pipe().Layout())
        )
        assert torch.equal(default.frames, base.frames) and default.decisions == base.decisions
