"""Tokens that are pruned to a weight: they stay, and count less."""

import pytest
import torch
from builders import (
    CHUNK,
    GRID,
    NUM_TOKENS,
    embeds,
    far_noise,
    far_pipeline,
    held_tokens,
    latent_pipeline,
    noise,
    randn,
    roll,
    steady_noise,
    triggers,
)
from contract import EAGER
from test_layout import HEAD_DIM, ROPE_DIMS, attend, rope, write, written_out

from tokentrim import ContextPolicy, RollingKVCache, TokenTrim
from tokentrim.tokentrim_policies.registry import make_method
from tokentrim.tokentrim_views.layout import Pass


def soft(weight):
    return {"tokentrim": {**EAGER, "prune_weight": weight}}


@pytest.mark.parametrize("num_videos", [1, 2])
def test_pruned_tokens_are_weighted_at_each_trim(num_videos):
    """For one video of a batch, in all frames except the protected one."""
    cache = RollingKVCache(GRID, ROPE_DIMS, num_videos, num_protected_frames=1)
    (key_a, value_a), (key_b, value_b) = write(cache, 1), write(cache, 2)
    last = num_videos - 1
    cache.evict({last: [1, 4]}, weight=0.3)
    cache.evict({last: [4, 5]}, weight=0.3)
    cache.evict({0: [0]})  # and some are gone
    cache.begin_pass(CHUNK, Pass())
    query, key, value = randn(3, num_videos, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    weights = torch.ones(num_videos, 9, NUM_TOKENS)
    weights[last, 1:6, [1, 5]], weights[last, 1:6, 4] = 0.3, 0.09
    weights[0, 1:6, 0] = 0
    keys = torch.cat([rope(torch.cat([key_a, key_b], dim=1), range(6)), rope(key, range(6, 9))], dim=1)
    values = torch.cat([value_a, value_b, value], dim=1)
    expected = written_out(rope(query, range(6, 9)), keys, values, weights.flatten(1))
    torch.testing.assert_close(attend(cache, query, key, value), expected, atol=1e-5, rtol=0)


def test_weights_follow_their_tokens_through_other_changes():
    cache = RollingKVCache(GRID, ROPE_DIMS, 1)
    write(cache, 1), write(cache, 2)
    cache.evict({0: [2]}, weight=0.5)
    write(cache, 3)
    cache.evict({0: [0]})
    cache.retain([1, 4, 7])
    weights = dict.fromkeys(held_tokens(cache), 0.0)
    assert len(weights) == 15
    weights[1, 2] = weights[4, 2] = torch.tensor(0.5).log().item()
    assert dict(zip(held_tokens(cache), cache.book.log_weight[0].tolist())) == pytest.approx(weights)
    state = RollingKVCache(GRID, ROPE_DIMS, 1)
    num_rows, _, *head = cache.layer(0).key.shape
    state.load_state_dict(cache.state_dict(), num_rows, 1, tuple(head))
    assert torch.equal(state.book.log_weight, cache.book.log_weight)
    again = cache.book.of_same([1, 4], NUM_TOKENS)  # as a recache carries them
    assert again.held[0].tolist() == [token > 0 for _ in (1, 4) for token in range(NUM_TOKENS)]
    assert again.log_weight[0].exp().tolist() == pytest.approx(
        [0.5 if t == 2 else 1 for _ in (1, 4) for t in range(6)]
    )


def test_tiny_weight_equals_hard_pruning():
    latents = steady_noise(8, [5])
    hard, none, half, plain = (
        roll(latent_pipeline(), latents, method=method) for method in (soft(0.0), soft(1e-30), soft(0.5), "plain")
    )
    torch.testing.assert_close(none.frames, hard.frames, atol=1e-4, rtol=0)
    assert triggers(none.decisions[0]) == triggers(hard.decisions[0])
    assert not torch.allclose(half.frames, hard.frames, atol=1e-3)
    assert not torch.allclose(half.frames, plain.frames, atol=1e-3)
    assert torch.equal(roll(latent_pipeline(), latents, method={"tokentrim": EAGER}).frames, hard.frames)


@pytest.mark.parametrize(
    "layout", [{"window": {"window_size": 9}}, "memrope", {"rolling_sink": {"window_size": 12}}], ids=str
)
def test_a_batch_equals_single_runs(layout):
    latents, text = steady_noise(8, [4, 6]), embeds(2)
    both = roll(latent_pipeline(), latents, prompt_embeds=text, method=soft(0.3), layout=layout)
    for video in range(2):
        rows = slice(video, video + 1)
        single = roll(latent_pipeline(), latents[rows], prompt_embeds=text[rows], method=soft(0.3), layout=layout)
        torch.testing.assert_close(single.frames, both.frames[rows], atol=1e-4, rtol=0)


def test_saved_run_resumes_to_the_same_bits(tmp_path):
    call = {
        "latents": steady_noise(8, [5]),
        "prompt_schedule": {0: embeds(), 6: embeds(seed=9)},
        "prompt_transition": "recache",
        "num_inference_steps": 2,
        "output_type": "latent",
        "method": soft(0.3),
        "window_size": 12,
    }
    whole, pipe = latent_pipeline()(**call), latent_pipeline()
    run = pipe.begin(pipe.plan(**call))
    chunks = pipe.roll_out(run)
    for _ in range(5):
        next(chunks)
    torch.save(run.state_dict(), tmp_path / "state.pt")
    chunks.close()
    pipe = latent_pipeline()
    run = pipe.begin(pipe.plan(**call))
    run.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = torch.cat([chunk.latents for chunk in pipe.roll_out(run)], dim=2)
    assert torch.equal(rest, whole.frames[:, :, 5 * CHUNK :])


class Trimmer(ContextPolicy):
    prune_weight = 0.5


def test_policies_of_a_method_share_one_weight():
    assert make_method("tokentrim", {}).prune_weight == 0
    assert make_method([soft(0.3), ContextPolicy()], {}).prune_weight == 0.3
    with pytest.raises(ValueError, match="`method` .*one prune weight.*0.3, 0.5"):
        make_method([soft(0.3), Trimmer()], {})


@pytest.mark.parametrize(
    ("weight", "error"), [(1, ValueError), (-0.1, ValueError), ("0.3", TypeError), (None, TypeError)]
)
def test_bad_weights_raise(weight, error):
    with pytest.raises(error, match="`prune_weight` .*0 to 1"):
        TokenTrim(prune_weight=weight)
    with pytest.raises(error, match=r"method\['tokentrim'\].*`prune_weight`"):
        roll(latent_pipeline(), noise(2), method=soft(weight))


def test_far_with_weights_raises():
    with pytest.raises(ValueError, match="`prune_weight` .*0 for AnyFlow-FAR.*0.3"):
        far_pipeline()(latents=far_noise(5), prompt_embeds=embeds(), method=soft(0.3), output_type="latent")
