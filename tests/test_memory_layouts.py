"""Rewrites of one video's memory in one layer by layouts, against the rules written out."""

import pytest
import torch
from builders import CHUNK, GRID, NUM_TOKENS, embeds, latent_pipeline, noise, randn, roll, steady_noise

from tokentrim.tokentrim_kv.book import TokenBook
from tokentrim.tokentrim_kv.rewriting import LayerContext, Rewriter
from tokentrim.tokentrim_views.averages import MemRoPE
from tokentrim.tokentrim_views.layout import Layout, Pass
from tokentrim.tokentrim_views.memory import Memory
from tokentrim.tokentrim_views.registry import make_layout
from tokentrim.tokentrim_views.rope import RotaryGrid, grid_places


HEADS, HEAD_DIM = 2, 12
ROPE_DIMS = (4, 4, 4)


def memory_of(frames, seed=0, gone=()):
    """Random keys and values of some frames; the (frame, token) pairs in `gone` are not held."""
    key, value = randn(2, len(frames), NUM_TOKENS, HEADS, HEAD_DIM, seed=seed)
    held = torch.ones(len(frames), NUM_TOKENS, dtype=torch.bool)
    for frame, token in gone:
        held[frames.index(frame), token] = False
    tag = torch.zeros(len(frames), NUM_TOKENS, 3, dtype=torch.long)
    return Memory(list(frames), held, key, value, tag, None, grid_places(GRID), ROPE_DIMS)


def query_of(seed=9):
    return randn(CHUNK * NUM_TOKENS, HEADS, HEAD_DIM, seed=seed)


# MemRoPE


def test_memrope_averages_evicted_frames_and_tokens():
    layout, memory = make_layout("memrope"), memory_of(range(12), gone=[(6, 2)])
    old = memory.key.clone()
    left = torch.cat([old[5], old[6, [0, 1, 3, 4, 5]], old[7]])
    layout.before_chunk(memory, [12, 13, 14], query_of())
    for place in (3, 4):  # at first both are the mean
        torch.testing.assert_close(memory.key[place], left.mean(dim=0).expand(NUM_TOKENS, -1, -1))
    others = [frame for frame in range(12) if frame not in (3, 4)]
    assert torch.equal(memory.key[others], old[others])


@pytest.mark.parametrize(
    ("settings", "longest", "expected"),
    [
        ({}, 3, (12, 4)),
        ({}, 2, (12, 5)),
        ({}, 5, (14, 4)),
        ({"window_size": 15}, 3, (15, 7)),
        ({"window_size": 21}, 4, (21, 12)),
        ({"num_recent_frames": 7}, 3, (15, 7)),
        ({"num_recent_frames": 1}, 3, (9, 1)),
        ({"num_sink_frames": 6}, 3, (15, 4)),
        ({"num_sink_frames": 0}, 3, (12, 7)),
        ({"window_size": 15, "num_recent_frames": 4}, 3, (15, 4)),
        ({"window_size": 11}, 3, (11, 4)),  # too small for the least of recent frames: refused
    ],
    ids=str,
)
def test_memrope_derives_the_sizes_that_are_not_given(settings, longest, expected):
    layout = make_layout({"memrope": settings})
    sized = layout.sized(longest)
    assert (sized.window_size, sized.num_recent_frames) == expected
    assert layout.sized(longest).sized(longest).num_recent_frames == expected[1]


@pytest.mark.parametrize("name", ["memrope", "tether", "ema_sink", "deep_sink"])
def test_memory_layouts_read_the_whole_window_that_is_given(name):
    """A window of 18: with 12 frames of it, 6 would be paid for and not used."""
    plan = latent_pipeline().plan(
        prompt_embeds=embeds(), latents=noise(8), output_type="latent", layout={name: {"window_size": 18}}
    )
    held, layout = [], plan.layout
    for chunk in range(12):
        new = [3 * chunk, 3 * chunk + 1, 3 * chunk + 2]
        held = list(layout.keep(held, new))
        view = layout.view(held, new, Pass())
        held += new
    assert len(view.frames) + len(new) == 18


def test_memrope_of_a_subclass_stays_one():
    class Mine(MemRoPE):
        pass

    plan = latent_pipeline().plan(prompt_embeds=embeds(), latents=noise(8), output_type="latent", layout=Mine(15))
    assert isinstance(plan.layout, Mine) and plan.layout.num_recent_frames == 7


def test_memrope_moves_each_average_at_its_rate():
    layout, memory = make_layout({"memrope": {"slow": 0.25, "fast": 0.5}}), memory_of([0, 1, 2, 3, 4, *range(8, 15)])
    old = memory.value.clone()
    layout.before_chunk(memory, [15, 16, 17], query_of())
    mean = old[5:8].mean(dim=(0, 1))  # frames 8, 9, 10
    torch.testing.assert_close(memory.value[3], 0.25 * mean + 0.75 * old[3])
    torch.testing.assert_close(memory.value[4], 0.5 * mean + 0.5 * old[4])


# Reward Forcing


def test_ema_sink_averages_leaving_frames_by_token():
    layout, memory = make_layout({"ema_sink": {"decay": 0.75}}), memory_of([0, 1, 2, *range(6, 12)], gone=[(7, 2)])
    key, value = memory.key.clone(), memory.value.clone()
    layout.before_chunk(memory, [12, 13, 14], query_of())  # frames 6, 7, 8 leave
    for table, old in ((memory.key, key), (memory.value, value)):
        expected = 0.75 * old[:3] + 0.25 * old[3:6]
        expected[1, 2] = old[1, 2]  # what is not there enters nothing
        torch.testing.assert_close(table[:3], expected)
        assert torch.equal(table[3:], old[3:])


def test_ema_sink_is_constant_while_nothing_leaves():
    layout, memory = make_layout("ema_sink"), memory_of(range(6))
    old = memory.key.clone()
    layout.before_chunk(memory, [6, 7, 8], query_of())
    assert torch.equal(memory.key, old)


@pytest.mark.parametrize("partition", [[3] * 6, [1, 3, 3, 3, 3], [2, 1, 3, 2, 1, 3]])
def test_ema_sink_averages_each_frame_once(partition):
    """Also if chunks differ in size."""
    layout, held, entered, start = make_layout("ema_sink"), [], [], 0

    for size in partition:
        new = list(range(start, start + size))
        held, start = layout.keep(held, new), start + size
        memory = memory_of(held, seed=start)
        before = memory.key.clone()
        layout.before_chunk(memory, new, query_of())
        oldest = new[-1] + 1 - 6
        entered += [frame for frame in held if 3 <= frame < oldest]
        assert [not torch.equal(*pair) for pair in zip(memory.key, before)] == [
            any(3 <= frame < oldest and frame % 3 == place for frame in held) for place in held
        ]
        held = held + new
    assert entered == list(range(3, start - 6))


# TetherCache


def test_tether_admits_by_mass_and_aligns_admitted_frames():
    layout = make_layout({"tether": {"window_size": 12, "diversity": 0.0, "align": 1.0}})
    memory, query = memory_of([*range(8), 8, 9, 10, 11], seed=3), query_of()
    key, value = memory.key.clone(), memory.value.clone()
    mass = torch.einsum("qhd,fthd->fqth", query, key[3:11]).mean(dim=(1, 2, 3))
    kept = [3 + index for index in mass.topk(5).indices.sort().values.tolist()]
    assert any(frame >= 8 for frame in kept) and any(frame < 8 for frame in kept)
    layout.before_commit(memory, [12, 13, 14], query)
    assert [3 + place + int(memory.tag[3 + place, 0, 0]) for place in range(5)] == kept
    for table, old in ((memory.key, key), (memory.value, value)):
        tokens = old[:8].flatten(0, 1)  # sink and memory before the admission
        for place, frame in enumerate(kept, start=3):
            if frame < 8:
                assert torch.equal(table[place], old[frame])
                continue
            torch.testing.assert_close(table[place].mean(dim=0), tokens.mean(dim=0), atol=1e-5, rtol=0)
            torch.testing.assert_close(
                table[place].std(dim=0, correction=0), tokens.std(dim=0, correction=0), atol=1e-5, rtol=0
            )


def test_tether_scores_include_diversity():
    layout, memory = make_layout({"tether": {"window_size": 12, "diversity": 0.5}}), memory_of(range(12))
    mass, frames = (memory.key[3:11].mean(dim=1) * query_of().mean(dim=0)).sum(-1).mean(-1), list(range(3, 11))
    mass = (mass / HEAD_DIM**0.5).softmax(dim=0)
    nearest = [max(torch.exp(torch.tensor(-abs(i - j) / 4.0)) * mass[j - 3] for j in frames if j != i) for i in frames]
    expected = mass + 0.5 * (1 - torch.stack(nearest)).clamp_min(0)
    torch.testing.assert_close(layout.scores(memory, range(3, 11), frames, query_of()), expected)


def test_place_keeps_its_token_if_the_admitted_frame_has_none():
    layout, query = make_layout({"tether": {"window_size": 12, "align": 0.0}}), query_of()
    memory = memory_of(range(12), gone=[(9, 1)])
    old = memory.key.clone()
    layout.scores = lambda memory, candidates, frames, query: torch.tensor([1.0, 1, 1, 1, 0, 0, 2, 0])  # frame 9
    layout.before_commit(memory, [12, 13, 14], query)
    assert torch.equal(memory.key[7, [0, 2, 3, 4, 5]], old[9, [0, 2, 3, 4, 5]])
    assert torch.equal(memory.key[7, 1], old[7, 1])


def test_tame_alone_aligns_each_frame_to_the_sink_once():
    layout, memory = make_layout({"tame": {"align": 1.0}}), memory_of([0, 1, 2, 6, 7], gone=[(6, 0)])
    old = memory.key.clone()
    layout.before_chunk(memory, [8, 9, 10], query_of())
    assert torch.equal(memory.key[:3], old[:3])
    sink = old[:3].flatten(0, 1)
    for place, tokens in ((3, [1, 2, 3, 4, 5]), (4, [0, 1, 2, 3, 4, 5])):
        torch.testing.assert_close(memory.key[place, tokens].mean(dim=0), sink.mean(dim=0), atol=1e-5, rtol=0)
        spread = memory.key[place, tokens].std(dim=0, correction=0)
        torch.testing.assert_close(spread, sink.std(dim=0, correction=0), atol=1e-5, rtol=0)
    once = memory.key.clone()
    layout.align = 0.5
    layout.before_chunk(memory, [11, 12, 13], query_of())
    assert torch.equal(memory.key, once)


# Deep Forcing with a budget

BUDGET = {"deep_sink": {"window_size": 12, "num_sink_frames": 3, "budget": 9}}


def selection(memory):
    """[latent frame, grid token] of the tokens in the places of frames 3 and 4."""
    places = [(frame, token) for frame in (3, 4) for token in range(NUM_TOKENS)]
    return [(f + int(memory.tag[f, n, 1]), n + int(memory.tag[f, n, 2])) for f, n in places]


def test_compression_keeps_the_tokens_that_recent_queries_attend_to_most():
    """With their time and grid place, in whatever place they are stored."""
    layout, memory, query = make_layout(BUDGET), memory_of(range(12)), query_of()
    layout.before_commit(memory, [9, 10, 11], query_of(8))
    key, places = memory.key.clone(), memory.places
    queries = torch.cat([query_of(8)[-NUM_TOKENS:], query])  # of frame 11, and of the chunk
    time = torch.tensor([11, 12, 13, 14]).repeat_interleave(NUM_TOKENS)
    rotated = memory.rotated(queries, time, places.repeat(4, 1))
    keys = {frame: memory.rotated(key[frame], torch.full((NUM_TOKENS,), frame), places) for frame in range(3, 11)}
    scores = {(f, n): (rotated * keys[f][n]).sum().item() for f in keys for n in range(NUM_TOKENS)}
    layout.before_chunk(memory, [12, 13, 14], query)
    kept = selection(memory)
    assert sorted(kept) == sorted(sorted(scores, key=scores.get)[-12:])
    for place, (frame, token) in enumerate(kept):
        target = divmod(place, NUM_TOKENS)
        time = torch.tensor([3 + target[0]])
        stands = memory.rotated(memory.key[3 + target[0], target[1]][None], time, places[target[1]][None])
        torch.testing.assert_close(stands[0], keys[frame][token], atol=1e-5, rtol=0)
    layout.before_chunk(memory, [15, 16, 17], query)
    assert selection(memory) == kept  # every second chunk


def test_token_selected_seven_times_is_not_a_candidate():
    layout, memory = make_layout(BUDGET), memory_of(range(12))
    layout.before_chunk(memory, [12, 13, 14], query_of())
    assert (memory.tag[3:5, :, 0] == 1).all()
    chosen, again = selection(memory), memory_of(range(12))
    for frame, token in chosen[:3]:
        again.tag[frame, token, 0] = 7
    layout.before_chunk(again, [12, 13, 14], query_of())
    assert not set(chosen[:3]) & set(selection(again)) and set(chosen[3:]) <= set(selection(again))


# The hooks


def test_hooks_write_only_held_tokens_of_their_row():
    book = TokenBook.of_frames([0, 5], NUM_TOKENS, 2)
    book.held = book.held.clone()
    book.held[1, 7] = False  # frame 5, token 1 of the second video
    key, value = randn(2, 4, 2 * NUM_TOKENS, HEADS, HEAD_DIM)  # two branches
    past, seen = LayerContext(key, value), []

    def hook(memory, new, query):
        seen.append((memory.held[1, 1].item(), new, query[0, 0, 0].item()))
        memory.key = memory.key + 1
        memory.note = torch.tensor([len(seen)])

    query = torch.arange(4.0).view(4, 1, 1, 1)
    unrotated = torch.ones(1, 1, 1, HEAD_DIM // 2), torch.zeros(1, 1, 1, HEAD_DIM // 2)
    rope = RotaryGrid(grid_places(GRID), ROPE_DIMS)
    Rewriter(book, [0, 5], [6, 7], rope, unrotated).rewrite(hook, past, query)
    assert seen == [(True, [6, 7], 0.0), (False, [6, 7], 1.0), (True, [6, 7], 2.0), (False, [6, 7], 3.0)]
    expected = key + 1
    expected[[1, 3], 7] = key[[1, 3], 7]
    assert torch.equal(past.key, expected) and torch.equal(past.value, value)
    assert past.note.flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "negative_prompt_embeds": embeds(1, 8)}], ids=str)
def test_hooks_are_called_once_per_chunk_and_layer(settings):
    """Also if a chunk is regenerated, and if FlowMo predicts before the first step."""

    class Counting(Layout):
        def __init__(self):
            self.calls = []

        def before_chunk(self, memory, new, query):
            self.calls.append(("chunk", new[0], list(memory.frames), len(query)))

        def before_commit(self, memory, new, query):
            self.calls.append(("commit", new[0], list(memory.frames), len(query)))

    layout, num_rows = Counting(), 2 if settings else 1
    method = {"flowmo": {"chunks": "all"}, "tokentrim": {"drift_sensitivity": 0.0, "warmup_chunks": 1}}
    output = roll(latent_pipeline(), steady_noise(4, [2]), layout=layout, method=method, **settings)
    assert any(decision["trim"] for decision in output.decisions[0])
    calls = [
        (name, 3 * chunk, list(range(3 * chunk)), 3 * NUM_TOKENS)
        for chunk in (1, 2, 3)
        for name in ("chunk", "commit")[: 2 if chunk < 3 else 1]
        for _ in range(2 * num_rows)  # layers
    ]
    assert layout.calls == calls


def test_given_frames_pass_through_the_hooks_too():
    given = steady_noise(6, [3]).transpose(1, 2)[:, :15]
    for name in ("memrope", {"tether": {"window_size": 12}}, BUDGET):
        call = {"latents": steady_noise(8, [5]), "layout": name, "method": "plain"}
        frames = roll(latent_pipeline(), video_latents=given, **call).frames
        other = roll(latent_pipeline(), video_latents=given.flip(1), **call).frames
        assert torch.equal(frames[:, :, :15], given.transpose(1, 2))
        assert (frames - other)[:, :, 15:].abs().max() > 1e-3 and frames.abs().max() < 100
