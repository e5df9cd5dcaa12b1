"""Training-free methods of the field as layouts: frames and positions of each pass, written out by hand, and rules for
every named layout."""

import math

import pytest
import torch
from builders import (
    CHUNK,
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

from tokentrim import Layout, RollingKVCache
from tokentrim.tokentrim_kv.cache import TokenBook
from tokentrim.tokentrim_views.layout import Pass
from tokentrim.tokentrim_views.registry import LAYOUTS, make_layout
from tokentrim.tokentrim_views.view import RunHistory
from tokentrim.tokentrim_views.windows import CommitForcing, RollingSink


# Of each name: settings under which frames leave within eight chunks of three
SMALL = {
    "window": {"window": {"window_size": 9, "num_sink_frames": 3, "sink_at_commit": False}},
    "infinity_rope": {"infinity_rope": {"window_size": 9}},
    "longlive": {"longlive": {}},
    "commit_forcing": {"commit_forcing": {"window_size": 12, "commit_window_size": 12}},
    "recency": {"recency": {"window_size": 12}},
    "rolling_sink": {"rolling_sink": {"window_size": 12}},
    "deep_sink": {"deep_sink": {"window_size": 12, "num_sink_frames": 5}},
    "deep_sink, budget": {"deep_sink": {"window_size": 12, "num_sink_frames": 3, "budget": 9}},
    "memrope": {"memrope": {}},
    "ema_sink": {"ema_sink": {"decay": 0.5}},
    "tether": {"tether": {"window_size": 12}},
    "tame": {"tame": {"window_size": 9}},
    "attention_bias": {"attention_bias": {"window_size": 9}},
    "latent_memory": {"latent_memory": {"window_size": 8, "num_memory_frames": 3, "num_excluded_frames": 1}},
    "id_forcing": {"id_forcing": {"num_native_chunks": 3}},
    "shots": {"shots": {"window_size": 9, "num_sink_frames": 2}},
    "triattention": {
        "triattention": {"window_size": 9, "num_sink_frames": 1, "num_recent_frames": 2, "budget": 6},
    },
    "pyramid": {
        "pyramid": {
            "labels": [[0, 1], [2, 0]], "period": 3, "num_cyclic": 2, "interval": 3, "num_strided": 2, "num_merged": 2,
        },
    },
    "by_head": {
        "by_head": {"labels": [[0, 1], [1, 0]], "layouts": [{"window": {"window_size": 6}}, "infinity_rope"]},
    },
    "strided": {"strided": {"window_size": 12, "num_strided_frames": 3, "stride": 4}},
    "pinned": {"pinned": {"frames": [5], "window_size": 9}},
}  # fmt: skip
ONE_CHUNK_A_PASS = {
    "infinity_rope",
    "recency",
    "rolling_sink",
    "deep_sink",
    "deep_sink, budget",
    "memrope",
    "ema_sink",
    "tether",
    "tame",
    "latent_memory",
    "id_forcing",
    "shots",
    "triattention",
    "pyramid",
    "by_head",
    "strided",
    "pinned",
}
NOT_PLAIN = {  # weights, or a past that is not read as it was written from the start
    "attention_bias", "recency", "tame", "latent_memory", "id_forcing", "triattention", "pyramid", "by_head", "strided",
}  # fmt: skip
EAGER = {"tokentrim": {"drift_sensitivity": 0.0, "prune_fraction": 0.3, "warmup_chunks": 1}}


def test_every_name_is_tested():
    assert {name for layout in SMALL.values() for name in layout} == set(LAYOUTS)


# The tables


def views(layout, num_chunks, events=None, num_steps=1):
    """The views of each chunk's passes, by kind, computed from frame numbers as a rollout asks for them."""
    history = RunHistory([], {frame: randn(1, 4, seed=frame) for frame in range(60)})
    layout, held, passes = make_layout(layout).after(history), [], []
    for chunk in range(num_chunks):
        new, event = list(range(CHUNK * chunk, CHUNK * chunk + CHUNK)), (events or {}).get(chunk)
        views = {}
        if event in ("flush", "cut"):
            held = layout.flush(list(held))
        elif event == "recache":
            stay, again = layout.recache(list(held))
            views["recache"] = layout.view(list(stay), again, Pass("recache"))
            held = stay + again
        held = layout.keep(list(held), list(new))
        for kind in ("denoise", "commit"):
            for step in range(num_steps if kind == "denoise" else 1):
                views[kind if step == 0 else f"{kind} {step}"] = layout.view(
                    list(held), list(new), Pass(kind, step, event == "cut")
                )
        assert all(frames_of(view) <= set(held) for kind, view in views.items() if kind != "recache")
        passes.append(views)
        held = held + new
    return passes


def frames_of(views):
    """Frames that a view, or some of them, read of the past of the first video."""
    views = views if isinstance(views, list) else [views]
    return {each[0] if isinstance(each, list) else each for view in views for each in view.frames}


def table(view):
    """`frame@position` of the frames that are read, then a bar and the keys of the pass, and query positions if they
    differ."""
    past = " ".join(f"{frame}@{position}" for frame, position in zip(view.frames, view.positions))
    own = " ".join(map(str, view.own_positions))
    queries = view.query_positions
    elsewhere = queries is not None and list(queries) != list(view.own_positions)
    return f"{past} | {own}".strip() + (" < " + " ".join(map(str, queries)) if elsewhere else "")


TABLES = [
    # Infinity-RoPE: slots; queries at the end of the window, also while slots refill
    ("infinity_rope", {}, 0, "denoise", "| 0 1 2"),
    ("infinity_rope", {}, 1, "denoise", "0@0 1@1 2@2 | 3 4 5"),
    ("infinity_rope", {}, 2, "denoise", "0@0 4@1 5@2 | 3 4 5"),
    ("infinity_rope", {}, 2, "commit", "0@0 4@1 5@2 | 3 4 5"),
    ("infinity_rope", {}, 7, "commit", "0@0 19@1 20@2 | 3 4 5"),
    ({"infinity_rope": {"window_size": 12}}, {5: "flush"}, 4, "denoise",
     "0@0 4@1 5@2 6@3 7@4 8@5 9@6 10@7 11@8 | 9 10 11"),
    ({"infinity_rope": {"window_size": 12}}, {5: "flush"}, 5, "denoise", "0@0 13@1 14@2 | 3 4 5 < 9 10 11"),
    ({"infinity_rope": {"window_size": 12}}, {5: "flush"}, 6, "commit",
     "0@0 13@1 14@2 15@3 16@4 17@5 | 6 7 8 < 9 10 11"),
    ({"infinity_rope": {"window_size": 12}}, {5: "cut"}, 5, "denoise", "0@0 13@1 14@2 | 45 46 47"),
    ({"infinity_rope": {"window_size": 12}}, {5: "cut"}, 5, "commit", "0@0 13@1 14@2 | 45 46 47"),
    ({"infinity_rope": {"window_size": 12}}, {5: "cut"}, 6, "denoise",
     "0@0 13@1 14@2 15@3 16@4 17@5 | 6 7 8 < 9 10 11"),
    # LongLive: sink 3 + newest 9; recache over the newest, which read the old sink
    ("longlive", {}, 5, "denoise", "0@0 1@1 2@2 9@9 10@10 11@11 12@12 13@13 14@14 | 15 16 17"),
    ("longlive", {}, 5, "commit", "0@0 1@1 2@2 9@9 10@10 11@11 12@12 13@13 14@14 | 15 16 17"),
    ("longlive", {6: "recache"}, 6, "recache", "0@0 1@1 2@2 | 9 10 11 12 13 14 15 16 17"),
    ("longlive", {2: "recache"}, 2, "recache", "| 0 1 2 3 4 5"),
    ({"longlive": {"relative_positions": True}}, {6: "recache"}, 6, "recache", "0@0 1@1 2@2 | 3 4 5 6 7 8 9 10 11"),
    ({"longlive": {"relative_positions": True}}, {}, 5, "denoise",
     "0@0 1@1 2@2 9@3 10@4 11@5 12@6 13@7 14@8 | 9 10 11"),
    ({"longlive": {"renew_sink": True}}, {}, 5, "denoise",
     "0@0 1@1 2@2 9@9 10@10 11@11 12@12 13@13 14@14 | 15 16 17"),
    ({"longlive": {"renew_sink": True}}, {6: "recache"}, 6, "recache", "| 6 7 8 9 10 11 12 13 14 15 16 17"),
    ({"longlive": {"renew_sink": True}}, {6: "recache"}, 6, "denoise",
     "6@6 7@7 8@8 12@12 13@13 14@14 15@15 16@16 17@17 | 18 19 20"),
    ({"longlive": {"renew_sink": True}}, {6: "recache"}, 8, "commit",
     "6@6 7@7 8@8 18@18 19@19 20@20 21@21 22@22 23@23 | 24 25 26"),
    # Commit Forcing: denoising reads the sink directly before the newest, the commit reads none
    ({"commit_forcing": {"window_size": 9, "commit_window_size": 9}}, {}, 2, "denoise",
     "0@0 1@1 2@2 3@3 4@4 5@5 | 6 7 8"),
    ({"commit_forcing": {"window_size": 9, "commit_window_size": 9}}, {}, 4, "denoise",
     "0@6 1@7 2@8 9@9 10@10 11@11 | 12 13 14"),
    ({"commit_forcing": {"window_size": 9, "commit_window_size": 9}}, {}, 4, "commit",
     "6@6 7@7 8@8 9@9 10@10 11@11 | 12 13 14"),
    ({"commit_forcing": {"window_size": 9, "commit_window_size": None}}, {}, 4, "commit",
     "0@6 1@7 2@8 9@9 10@10 11@11 | 12 13 14"),
    ({"commit_forcing": {"window_size": 9, "commit_window_size": 6, "move_sink": False}}, {}, 4, "denoise",
     "0@0 1@1 2@2 9@9 10@10 11@11 | 12 13 14"),
    ({"commit_forcing": {"window_size": 9, "commit_window_size": 6, "move_sink": False}}, {}, 4, "commit",
     "9@9 10@10 11@11 | 12 13 14"),
    ({"recency": {"window_size": 9}}, {}, 4, "commit", "0@6 1@7 2@8 9@9 10@10 11@11 | 12 13 14"),
    # Rolling Sink: the last chunk as it was made, and replays of frames 0 to 8, to and fro
    ({"rolling_sink": {"window_size": 12}}, {}, 3, "denoise",
     "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 8@8 | 9 10 11"),
    ({"rolling_sink": {"window_size": 12}}, {}, 4, "denoise",
     "3@3 4@4 5@5 6@6 7@7 8@8 9@9 10@10 11@11 | 12 13 14"),
    ({"rolling_sink": {"window_size": 12}}, {}, 5, "denoise",
     "6@6 7@7 8@8 8@9 7@10 6@11 12@12 13@13 14@14 | 15 16 17"),
    ({"rolling_sink": {"window_size": 12}}, {}, 7, "commit",
     "5@12 4@13 3@14 2@15 1@16 0@17 18@18 19@19 20@20 | 21 22 23"),
    ({"rolling_sink": {"window_size": 12}}, {}, 8, "denoise",
     "2@15 1@16 0@17 0@18 1@19 2@20 21@21 22@22 23@23 | 24 25 26"),
    # Deep sink: it moves along from the first chunk that rolls, three positions before the next frame
    ({"deep_sink": {"window_size": 12, "num_sink_frames": 5}}, {}, 3, "denoise",
     "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 8@8 | 9 10 11"),
    ({"deep_sink": {"window_size": 12, "num_sink_frames": 5}}, {}, 4, "denoise",
     "0@0 1@1 2@2 3@3 4@4 8@8 9@9 10@10 11@11 | 12 13 14"),
    ({"deep_sink": {"window_size": 12, "num_sink_frames": 5}}, {}, 6, "commit",
     "0@6 1@7 2@8 3@9 4@10 14@14 15@15 16@16 17@17 | 18 19 20"),
    # ... with a budget: the sink moves with each compression, every other chunk; frames 3 and 4 are places of what it left
    (SMALL["deep_sink, budget"], {}, 3, "commit", "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 8@8 | 9 10 11"),
    (SMALL["deep_sink, budget"], {}, 4, "denoise", "0@3 1@4 2@5 3@3 4@4 11@11 | 12 13 14"),
    (SMALL["deep_sink, budget"], {}, 5, "denoise", "0@3 1@4 2@5 3@3 4@4 11@11 12@12 13@13 14@14 | 15 16 17"),
    (SMALL["deep_sink, budget"], {}, 6, "commit", "0@9 1@10 2@11 3@3 4@4 17@17 | 18 19 20"),
    # MemRoPE: frames 3 and 4 are the places of the averages
    ("memrope", {}, 3, "commit", "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 8@8 | 9 10 11"),
    ("memrope", {}, 4, "denoise", "0@0 1@1 2@2 3@3 4@4 8@5 9@6 10@7 11@8 | 9 10 11"),
    ("memrope", {}, 7, "commit", "0@0 1@1 2@2 3@3 4@4 17@5 18@6 19@7 20@8 | 9 10 11"),
    # Reward Forcing: slots of a window with a sink
    ("ema_sink", {}, 2, "commit", "0@0 1@1 2@2 3@3 4@4 5@5 | 6 7 8"),
    ("ema_sink", {}, 5, "denoise", "0@0 1@1 2@2 12@3 13@4 14@5 | 6 7 8"),
    # TetherCache: frames 3 to 7 are the places of the memory
    ({"tether": {"window_size": 12}}, {}, 3, "commit", "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 8@8 | 9 10 11"),
    ({"tether": {"window_size": 12}}, {}, 4, "denoise", "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 11@8 | 9 10 11"),
    ({"tether": {"window_size": 12}}, {}, 6, "commit", "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 17@8 | 9 10 11"),
    # Its alignment alone reads what a window reads
    ({"tame": {"window_size": 9}}, {}, 4, "commit", "0@0 1@1 2@2 9@9 10@10 11@11 | 12 13 14"),
    # LongLive-RAG: the sink, found frames at position 0, and the newest of the window, in its slots; some are not read
    ("latent_memory", {}, 2, "denoise", "0@0 4@4 5@5 | 6 7 8"),
    ("latent_memory", {}, 5, "commit", "0@0 13@7 14@8 | 9 10 11"),
    # ID-Forcing: all of the past, then the sink, the chunk before last and the last one; commits read the one before alone
    ({"id_forcing": {"num_native_chunks": 3}}, {}, 2, "denoise", "0@0 1@1 2@2 3@3 4@4 5@5 | 6 7 8"),
    ({"id_forcing": {"num_native_chunks": 3}}, {}, 2, "commit", "3@0 4@1 5@2 | 3 4 5"),
    ({"id_forcing": {"num_native_chunks": 3}}, {}, 5, "denoise",
     "0@0 1@1 2@2 9@3 10@4 11@5 12@6 13@7 14@8 | 9 10 11"),
    ({"id_forcing": {"num_native_chunks": 3, "re_encode": False}}, {}, 5, "commit", "| 0 1 2"),
    # TriAttention: frames 3 to 5 are the places of what was selected
    ("triattention", {}, 3, "denoise", "0@0 1@1 2@2 3@3 4@4 5@5 6@6 7@7 8@8 | 9 10 11"),
    ("triattention", {}, 6, "commit", "0@0 1@1 2@2 3@3 4@4 5@5 15@15 16@16 17@17 | 18 19 20"),
    ({"triattention": {"budget": 6}}, {}, 6, "commit", "0@0 1@1 2@2 15@15 16@16 17@17 | 18 19 20"),
    # Ours: every fourth frame behind the newest, and pinned frames, in slots
    (SMALL["strided"], {}, 7, "denoise", "0@0 1@1 2@2 8@3 12@4 16@5 18@6 19@7 20@8 | 9 10 11"),
    (SMALL["pinned"], {}, 5, "commit", "0@0 1@1 2@2 5@3 13@4 14@5 | 6 7 8"),
    # A bias reads what its window reads
    ({"attention_bias": {"window_size": 9, "num_sink_frames": 1}}, {}, 4, "denoise",
     "0@0 7@7 8@8 9@9 10@10 11@11 | 12 13 14"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "events", "chunk", "kind", "expected"), TABLES)
def test_views_equal_the_written_out_frames_and_positions(layout, events, chunk, kind, expected):
    assert table(views(layout, chunk + 1, events)[chunk][kind]) == expected


@pytest.mark.parametrize(
    ("layout", "chunk", "kind", "weights"),
    [
        # Frames of the chunk directly before and the sink weigh one; older ones less, most in the first step
        ({"recency": {"window_size": 15}}, 5, "denoise", [0] * 3 + [-4 * 0.5**0.2] * 3 + [-4 * 0.25**0.2] * 3 + [0] * 3),
        ({"recency": {"window_size": 15}}, 5, "denoise 1", [0] * 3 + [-4 * 0.5**0.4] * 3 + [-4 * 0.25**0.4] * 3 + [0] * 3),
        ({"recency": {"window_size": 15}}, 5, "denoise 3", [0] * 3 + [-4 * 0.5**1.6] * 3 + [-4 * 0.25**1.6] * 3 + [0] * 3),
        ({"recency": {"window_size": 15}}, 5, "commit", None),
        ({"recency": {"window_size": 15}}, 2, "denoise", [0] * 6),  # before the window is full
        ("recency", 7, "denoise", [0] * 3 + [-4] * 3 + [-4 * 0.75**0.2] * 3 + [-4 * 0.5**0.2] * 3 + [-4 * 0.25**0.2] * 3 + [0] * 3),
        # All of the past but the oldest frame that is held
        ("attention_bias", 2, "denoise", [0] + [math.log(0.3)] * 5),
        ({"attention_bias": {"window_size": 9, "weight": 0.5}}, 5, "denoise 2", [0] + [math.log(0.5)] * 5),
        ({"attention_bias": {"window_size": 9}}, 5, "commit", None),
    ],
)  # fmt: skip
def test_weights_of_the_past_equal_the_written_out_ones(layout, chunk, kind, weights):
    found = views(layout, chunk + 1, num_steps=4)[chunk][kind].log_weights
    assert found == (None if weights is None else pytest.approx(weights))


def test_recency_is_commit_forcing_with_a_bias():
    expected = CommitForcing(recency_bias=True, commit_window_size=None)
    assert vars(make_layout("recency")) == vars(expected) and type(make_layout("recency")) is CommitForcing


def test_rolling_sink_replays_the_first_window_forwards_in_even_laps():
    assert [RollingSink.replayed(frame, 4) for frame in range(14)] == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 3, 2]


def test_a_renewed_sink_is_safe_from_eviction():
    cache = RollingKVCache((1, 2), (4, 4, 4), 1, layout=make_layout({"longlive": {"renew_sink": True}}))
    cache.frames, cache.book = [*range(6, 18)], TokenBook.of_frames(range(6, 18), 2, 1)
    cache.evict({0: [1]})
    assert [frame for frame, token in held_tokens(cache) if token == 1] == [6, 7, 8]
    assert cache.layout.flush(list(cache.frames)) == [6, 7, 8, 16, 17]


# What holds for every name


@pytest.mark.parametrize("name", SMALL)
def test_frames_that_are_read_are_held(name):
    """And the window has the stated size, at every chunk."""
    layout = make_layout(SMALL[name])
    for passes in views(layout, 12):
        for view in passes.values():
            longest = max(len(each.frames) for each in (view if isinstance(view, list) else [view]))
            assert longest + CHUNK <= max(layout.window_size, getattr(layout, "commit_window_size", None) or 0)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in NOT_PLAIN])
def test_layouts_equal_plain_while_all_frames_fit(name):
    """If no frame has left and no weights apply, every layout reads everything at its own position."""
    ((kind, settings),) = SMALL[name].items()
    settings = {**settings, "window_size": 15, **({"commit_window_size": 15} if name == "commit_forcing" else {})}
    expected = roll(latent_pipeline(), noise(5), method="plain", layout=Layout()).frames
    assert torch.equal(roll(latent_pipeline(), noise(5), method="plain", layout={kind: settings}).frames, expected)


@pytest.mark.parametrize("name", SMALL)
def test_layout_changes_the_video_and_not_the_pipeline(name):
    pipe = latent_pipeline()
    before = roll(pipe, noise(7), method="plain").frames
    other = roll(pipe, noise(7), method="plain", layout=SMALL[name]).frames
    assert not torch.allclose(other, before, atol=1e-3)
    assert torch.equal(roll(pipe, noise(7), method="plain").frames, before)


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_equals_single_runs(name):
    """Videos are trimmed at different chunks, so they hold different tokens."""
    latents, text, settings = steady_noise(8, [4, 6]), embeds(2), {"method": EAGER, "layout": SMALL[name]}
    both = roll(latent_pipeline(), latents, prompt_embeds=text, **settings)
    assert triggers(both.decisions[0]) != triggers(both.decisions[1])
    for video in range(2):
        rows = slice(video, video + 1)
        single = roll(latent_pipeline(), latents[rows], prompt_embeds=text[rows], **settings)
        torch.testing.assert_close(single.frames, both.frames[rows], atol=1e-4, rtol=0)
        assert triggers(single.decisions[0]) == triggers(both.decisions[video])


@pytest.mark.parametrize("method", [EAGER, {"quarantine": {"sensitivity": 0.0}, "reanchor": {}}], ids=["trim", "plus"])
@pytest.mark.parametrize("name", SMALL)
def test_saved_run_resumes_to_the_same_bits(name, method, tmp_path):
    call = {
        "latents": steady_noise(8, [5]),
        "prompt_embeds": embeds(),
        "num_inference_steps": 2,
        "output_type": "latent",
        "method": method,
        "layout": SMALL[name],
    }
    whole = latent_pipeline()(**call)
    pipe = latent_pipeline()
    run = pipe.begin(pipe.plan(**call))
    chunks = pipe.roll_out(run)
    for index in range(7):
        next(chunks)
        torch.save(run.state_dict(), tmp_path / f"{index + 1}.pt")
    chunks.close()
    for cut in (2, 5, 7):
        pipe = latent_pipeline()
        run = pipe.begin(pipe.plan(**call))
        run.load_state_dict(torch.load(tmp_path / f"{cut}.pt", weights_only=True))
        rest = torch.cat([chunk.latents for chunk in pipe.roll_out(run)], dim=2)
        assert torch.equal(rest, whole.frames[:, :, cut * CHUNK :])


@pytest.mark.parametrize("transition", ["keep", "recache", "flush", "cut", "shot"])
@pytest.mark.parametrize("name", SMALL)
def test_transitions_work_or_raise_with_the_reason(name, transition):
    layout = SMALL[name]
    call = {
        "prompt_schedule": {0: embeds(), 5: embeds(seed=9)},
        "prompt_transition": transition,
        "prompt_embeds": None,
    }
    if transition in make_layout(layout).transitions:
        roll(latent_pipeline(), noise(7), layout=layout, method=EAGER, **call)
        return
    with pytest.raises(ValueError, match=f"`prompt_transition` must be one of .* for .*, but is '{transition}'"):
        roll(latent_pipeline(), noise(7), layout=layout, **call)


@pytest.mark.parametrize("name", SMALL)
def test_rolling_forcing_and_far_work_or_raise_with_the_reason(name):
    rolling = {"rollout": "rolling_forcing", "num_inference_steps": 2, "layout": SMALL[name]}
    far = {"prompt_embeds": embeds(), "num_inference_steps": 1, "output_type": "latent", "layout": SMALL[name]}
    calls = (
        lambda: roll(latent_pipeline(), noise(7), method="plain", **rolling),
        lambda: far_pipeline()(latents=far_noise(11), method="plain", **far),
    )
    for call in calls:
        if name not in ONE_CHUNK_A_PASS:
            call()
            continue
        with pytest.raises(ValueError, match="`layout` .*passes of . chunks.*needs passes of one chunk"):
            call()


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        ({"infinity_rope": {"window_size": 3}}, ValueError, "`window_size` .*>= 4"),
        ({"infinity_rope": {"window_size": None}}, TypeError, "`window_size` .*None"),
        ({"longlive": {"window_size": 5}}, ValueError, "`window_size` .*>= 6"),
        ({"longlive": {"renew_sink": 1}}, TypeError, "`renew_sink` .*1"),
        ({"commit_forcing": {"commit_window_size": 2}}, ValueError, "`commit_window_size` .*>= 3"),
        ({"commit_forcing": {"move_sink": None}}, TypeError, "`move_sink`"),
        ({"rolling_sink": {"window_size": 5}}, ValueError, "`window_size` .*>= 6"),
        ({"rolling_sink": {"num_sink_frames": 3}}, ValueError, r"layout\['rolling_sink'\].*window_size"),
        ({"deep_sink": {"window_size": 16}}, ValueError, "`window_size` .*>= 17"),
        ({"deep_sink": {"budget": 22}}, ValueError, "`budget` .*from 15 to `window_size`, 21.*22"),
        ({"deep_sink": {"budget": 12}}, ValueError, "`budget` .*from 15"),
        ({"deep_sink": {"budget": 16, "num_recent_frames": 2}}, ValueError, "`num_recent_frames` .*from 3 to 6"),
        ({"memrope": {"window_size": 11}}, ValueError, "`window_size` .*>= 12"),
        ({"memrope": {"slow": 2}}, ValueError, "`slow` .*0 to 1.*2"),
        ({"ema_sink": {"window_size": 5}}, ValueError, "`window_size` .*>= 6"),
        ({"ema_sink": {"num_sink_frames": 0}}, ValueError, "`num_sink_frames` .*at least 1"),
        ({"ema_sink": {"decay": 1.5}}, ValueError, "`decay` .*0 to 1"),
        ({"tether": {"window_size": 9}}, ValueError, "`window_size` .*>= 10"),
        ({"tether": {"num_recent_frames": 2}}, ValueError, "`num_recent_frames` .*>= 3"),
        ({"tether": {"align": -0.1}}, ValueError, "`align`"),
        ({"tether": {"temperature": 0}}, ValueError, "`temperature`"),
        ({"tame": {"num_sink_frames": 0}}, ValueError, "`num_sink_frames` .*at least 1"),
        ({"tame": {"align": 2}}, ValueError, "`align` .*0 to 1"),
        ({"attention_bias": {"weight": 0.0}}, ValueError, "`weight` .*> 0"),
        ({"attention_bias": {"weight": "0.3"}}, TypeError, "`weight`"),
    ],
    ids=str,
)
def test_bad_settings_raise(layout, error, message):
    with pytest.raises(error, match=message):
        roll(latent_pipeline(), noise(3), layout=layout)


@pytest.mark.parametrize("name", [name for name in SMALL if name in ONE_CHUNK_A_PASS])
def test_guidance_towards_the_prompt_itself_changes_nothing_in_a_stream(name):
    """Both branches read and rewrite a past each, chunk by chunk, while tokens leave."""
    call = {"latents": steady_noise(7, [5]), "prompt_embeds": embeds(), "num_inference_steps": 2}
    call |= {"method": EAGER, "layout": SMALL[name], "output_type": "latent"}
    plain = latent_pipeline()(**call)
    guidance = {"guidance_scale": 2.0, "negative_prompt_embeds": embeds()}
    with latent_pipeline().stream(**call, **guidance) as stream:
        latents = [chunk.latents for chunk in stream]
    torch.testing.assert_close(torch.cat(latents, dim=2), plain.frames, atol=1e-3, rtol=0)
