"""Which past frames a pass reads and at which positions: by hand, and in the cache."""

import logging

import pytest
import torch
from builders import (
    CHUNK,
    GRID,
    NUM_TOKENS,
    case_id,
    held_tokens,
    latent_pipeline,
    noise,
    processors,
    randn,
    roll,
    rope,
    tiny_transformer,
)

from tokentrim import Layout, RollingKVCache, TokenTrimPipeline, View, WindowLayout
from tokentrim.tokentrim_backbones.attention import CachedSelfAttnProcessor
from tokentrim.tokentrim_views.layout import Pass
from tokentrim.tokentrim_views.registry import make_layout


HEAD_DIM = 12
ROPE_DIMS = (4, 4, 4)
DENOISE, COMMIT = Pass("denoise", 0), Pass("commit")


# The tables


@pytest.mark.parametrize(
    ("window_size", "num_sink_frames", "sink_at_commit", "held", "new", "kept"),
    [
        # Everything, with a sink or without
        (None, 0, True, [0, 1, 2, 3, 4, 5], [6, 7, 8], [0, 1, 2, 3, 4, 5]),
        (None, 3, False, [0, 1, 2, 3, 4, 5], [6, 7, 8], [0, 1, 2, 3, 4, 5]),
        # A window counts the chunk at hand
        (6, 0, True, [0, 1, 2, 3, 4, 5], [6, 7, 8], [3, 4, 5]),
        (7, 0, True, [0, 1, 2, 3, 4, 5], [6, 7, 8], [2, 3, 4, 5]),
        (6, 0, True, [0, 1, 2, 3, 4, 5], [6], [1, 2, 3, 4, 5]),
        (3, 0, True, [0, 1, 2, 3, 4, 5], [6, 7, 8], []),
        (9, 0, True, [0, 1, 2, 3, 4, 5], [6, 7, 8], [0, 1, 2, 3, 4, 5]),
        # ... and the sink
        (9, 3, True, [0, 1, 2, 6, 7, 8, 9, 10, 11], [12, 13, 14], [0, 1, 2, 9, 10, 11]),
        (8, 1, True, [0, 7, 8, 9, 10, 11], [12, 13, 14], [0, 8, 9, 10, 11]),
        (4, 1, True, [0, 9, 10, 11], [12, 13, 14], [0]),
        (9, 3, True, [0, 1, 2], [3, 4, 5], [0, 1, 2]),
        (9, 3, True, [], [0, 1, 2], []),
        # A commit that reads no sink reads as many more recent frames, and they stay for it
        (9, 3, False, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [0, 1, 2, 6, 7, 8, 9, 10, 11]),
        (8, 1, False, [0, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [0, 7, 8, 9, 10, 11]),
        (9, 3, False, [0, 1, 2, 3, 4, 5], [6, 7, 8], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_window_keeps_the_sink_and_the_newest_frames(window_size, num_sink_frames, sink_at_commit, held, new, kept):
    """At all positions."""
    for relative_positions in (False, True):
        layout = WindowLayout(window_size, num_sink_frames, relative_positions, sink_at_commit)
        assert layout.keep(held, new) == kept


FULL = [0, 1, 2, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("settings", "held", "new", "pass_", "frames", "positions", "own_positions"),
    [
        # Absolute
        ((9, 0), [6, 7, 8, 9, 10, 11], [12, 13, 14], DENOISE, [6, 7, 8, 9, 10, 11], [6, 7, 8, 9, 10, 11], [12, 13, 14]),
        ((9, 3), FULL, [12, 13, 14], DENOISE, [0, 1, 2, 9, 10, 11], [0, 1, 2, 9, 10, 11], [12, 13, 14]),
        ((9, 3), FULL, [12, 13, 14], COMMIT, [0, 1, 2, 9, 10, 11], [0, 1, 2, 9, 10, 11], [12, 13, 14]),
        ((None, 3), [0, 1, 2, 3], [4, 5], DENOISE, [0, 1, 2, 3], [0, 1, 2, 3], [4, 5]),
        # Slots of the window, the sink directly before the recent frames
        ((9, 0, True), [6, 7, 8, 9, 10, 11], [12, 13, 14], DENOISE, [6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5], [6, 7, 8]),
        ((9, 3, True), FULL, [12, 13, 14], DENOISE, [0, 1, 2, 9, 10, 11], [0, 1, 2, 3, 4, 5], [6, 7, 8]),
        ((8, 1, True), [0, 8, 9, 10, 11], [12, 13, 14], COMMIT, [0, 8, 9, 10, 11], [0, 1, 2, 3, 4], [5, 6, 7]),
        ((9, 3, True), [0, 1, 2], [3, 4, 5], DENOISE, [0, 1, 2], [0, 1, 2], [3, 4, 5]),
        ((9, 3, True), [], [0, 1, 2], DENOISE, [], [], [0, 1, 2]),
        # Several chunks in flight share the window
        ((12, 3, True), FULL, [12, 13, 14, 15, 16, 17], DENOISE, [0, 1, 2, 9, 10, 11], [0, 1, 2, 3, 4, 5], [*range(6, 12)]),
        # A commit without the sink, in the same memory
        ((9, 3, False, False), FULL, [12, 13, 14], DENOISE, [0, 1, 2, 9, 10, 11], [0, 1, 2, 9, 10, 11], [12, 13, 14]),
        ((9, 3, False, False), FULL, [12, 13, 14], COMMIT, [6, 7, 8, 9, 10, 11], [6, 7, 8, 9, 10, 11], [12, 13, 14]),
        ((9, 3, True, False), FULL, [12, 13, 14], COMMIT, [6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5], [6, 7, 8]),
        ((9, 3, False, False), [0, 1, 2], [3, 4, 5], COMMIT, [0, 1, 2], [0, 1, 2], [3, 4, 5]),  # still in the window
    ],
)  # fmt: skip
def test_window_views(settings, held, new, pass_, frames, positions, own_positions):
    assert WindowLayout(*settings).view(held, new, pass_) == View(frames, positions, own_positions)


def test_default_layout_keeps_and_reads_everything():
    layout = Layout()
    assert layout.keep([0, 1, 5], [6, 7]) == [0, 1, 5]
    assert layout.view([0, 1, 5], [6, 7], DENOISE) == View([0, 1, 5], [0, 1, 5], [6, 7])


# By name


def test_make_layout_by_name_dict_and_object():
    for given in ("window", {"window": {}}):
        layout = make_layout(given)
        assert type(layout) is WindowLayout
        assert vars(layout) == {
            "window_size": None,
            "num_sink_frames": 0,
            "relative_positions": False,
            "sink_at_commit": True,
        }
    settings = {"window_size": 9, "num_sink_frames": 3, "relative_positions": True, "sink_at_commit": False}
    assert vars(make_layout({"window": settings})) == settings
    layout = WindowLayout(9)
    assert make_layout(layout) is layout


class NoView:
    def keep(self, held, new):
        return held


BAD = [
    ("windows", ValueError, "`layout` .*'window'.*'windows'"),
    ({"sink": {}}, ValueError, "`layout` .*'window'.*'sink'"),
    ({}, ValueError, "`layout` .*dict of one layout"),
    ({"window": {}, "sink": {}}, ValueError, "`layout` .*dict of one layout"),
    ({"window": {"size": 9}}, ValueError, r"layout\['window'\].*'window_size'.*'size'"),
    ({"window": 9}, TypeError, r"layout\['window'\].*a dict of settings.*9"),
    ({"window": {"window_size": 0}}, ValueError, "`window_size` .*>= 1.*0"),
    ({"window": {"window_size": "9"}}, TypeError, "`window_size` .*'9'"),
    ({"window": {"num_sink_frames": -1}}, ValueError, "`num_sink_frames` .*-1"),
    ({"window": {"relative_positions": 1}}, TypeError, "`relative_positions` .*1"),
    ({"window": {"sink_at_commit": None}}, TypeError, "`sink_at_commit` .*None"),
    (9, TypeError, "`layout` .*object with `keep` and `view`.*9"),
    (WindowLayout, TypeError, "`layout` .*object with `keep` and `view`.*WindowLayout"),
    (NoView(), TypeError, "`layout` .*object with `keep` and `view`.*NoView"),
    (["window"], TypeError, "`layout` .*object with `keep` and `view`"),
    ({"window": {"window_size": 2}}, ValueError, "`window_size` .*>= 3: 0 sink frames and a chunk of 3.*2"),
    (WindowLayout(5, 3), ValueError, "`window_size` .*>= 6: 3 sink frames and a chunk of 3.*5"),
]


@pytest.mark.parametrize(("layout", "error", "message"), BAD, ids=[case_id(case[0]) for case in BAD])
def test_bad_layout_raises_before_any_model_runs(layout, error, message):
    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(error, match=message):
        roll(pipe, noise(3), layout=layout)
    assert not forwards


@pytest.mark.parametrize(
    "setting", [{"window_size": 9}, {"num_sink_frames": 0}, {"relative_positions": False}, {"sink_at_commit": True}]
)
def test_window_settings_beside_a_layout_raise(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"`{name}` must be None where `layout` is given, but is {value}"):
        roll(latent_pipeline(), noise(2), layout="window", **setting)


def test_window_beside_the_checkpoints_layout_raises():
    pipe, valid = (
        latent_pipeline(layout={"longlive": {}}),
        "`window_size` must be None where `layout` is given, here",
    )
    with pytest.raises(ValueError, match=valid + " by the checkpoint: {'longlive': {}}, but is 9"):
        roll(pipe, noise(2), window_size=9)
    roll(pipe, noise(2), layout={"window": {"window_size": 9}})


def test_layout_overrides_the_checkpoints_window():
    pipe = latent_pipeline(window_size=6, num_sink_frames=1, relative_positions=True)
    everything = roll(latent_pipeline(), noise(4)).frames
    assert not torch.equal(roll(pipe, noise(4)).frames, everything)
    assert torch.equal(roll(pipe, noise(4), layout=Layout()).frames, everything)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window_size": 6},
        {"window_size": 9, "num_sink_frames": 3},
        {"window_size": 9, "num_sink_frames": 3, "relative_positions": True},
        {"window_size": 9, "num_sink_frames": 3, "sink_at_commit": False},
    ],
    ids=str,
)
def test_window_arguments_equal_a_window_layout(settings):
    expected = roll(latent_pipeline(), noise(6), **settings)
    for layout in ({"window": settings}, WindowLayout(**settings)):
        output = roll(latent_pipeline(), noise(6), layout=layout)
        assert torch.equal(output.frames, expected.frames) and output.decisions == expected.decisions


def test_pipeline_has_the_base_classes_of_layouts():
    assert TokenTrimPipeline.Layout is Layout and TokenTrimPipeline.View is View


# In the rollout


class Record(WindowLayout):
    """A window that records its calls."""

    def __init__(self, *settings):
        super().__init__(*settings)
        self.kept, self.views = [], []

    def keep(self, held, new):
        self.kept.append((held, new))
        return super().keep(held, new)

    def view(self, held, new, pass_):
        self.views.append((held, new, pass_.kind, pass_.step))
        return super().view(held, new, pass_)


def test_layout_is_asked_before_each_chunk_and_at_each_pass():
    layout, (a, b, c) = Record(6), ([0, 1, 2], [3, 4, 5], [6, 7, 8])
    roll(latent_pipeline(), noise(3), layout=layout, num_inference_steps=2)
    assert layout.kept == [([], a), (a, b), ([*a, *b], c)]
    assert layout.views == [
        ([], a, "denoise", 0),
        ([], a, "denoise", 1),
        ([], a, "commit", 0),
        (a, b, "denoise", 0),
        (a, b, "denoise", 1),
        (a, b, "commit", 0),
        (b, c, "denoise", 0),
        (b, c, "denoise", 1),
    ]


class Bare:
    """Only `keep` and `view`: the newest chunk, at the start of the axis."""

    def keep(self, held, new):
        return held[-CHUNK:]

    def view(self, held, new, pass_):
        return View(held, range(len(held)), range(len(held), len(held) + len(new)))


def test_object_with_keep_and_view_is_a_layout():
    expected = roll(latent_pipeline(), noise(5), window_size=6, relative_positions=True)
    output = roll(latent_pipeline(), noise(5), layout=Bare())
    assert torch.equal(output.frames, expected.frames)


def test_lists_of_a_layout_do_not_alias_the_cache():
    """A layout may change the lists that it receives."""

    class Careless(Layout):
        def keep(self, held, new):
            kept = list(held)
            held.clear(), new.clear()
            return kept

        def view(self, held, new, pass_):
            view = View(list(held), list(held), list(new))
            held.clear(), new.clear()
            return view

    assert torch.equal(
        roll(latent_pipeline(), noise(4), layout=Careless()).frames, roll(latent_pipeline(), noise(4)).frames
    )


def test_sink_not_read_at_commit_changes_the_cache():
    settings = {"window_size": 9, "num_sink_frames": 3}
    read, unread = (
        roll(latent_pipeline(), noise(7), **settings, sink_at_commit=sink_at_commit).frames
        for sink_at_commit in (True, False)
    )
    # Chunk 3 is the first whose commit leaves the sink out (the window is full), chunk 4 the first that reads it.
    assert torch.equal(read[:, :, : 4 * CHUNK], unread[:, :, : 4 * CHUNK])
    assert not torch.allclose(read[:, :, 4 * CHUNK :], unread[:, :, 4 * CHUNK :], atol=1e-4)


def test_sink_frames_are_never_evicted():
    cache = RollingKVCache(GRID, ROPE_DIMS, 1, layout=WindowLayout(9, 2), num_protected_frames=1)
    assert cache.num_protected_frames == 2
    write(cache)
    cache.evict({0: range(NUM_TOKENS)})
    assert {frame for frame, _ in held_tokens(cache)} == {0, 1}


@pytest.mark.parametrize(
    ("view", "error"),
    [
        (lambda held, new: View([*held, 99], [*held, 99], new), ValueError),  # a frame that is not held
        (lambda held, new: View([*held, *new], [*held, *new], new), ValueError),  # nor are its own
        (lambda held, new: View(held, [*held, 0], new), ValueError),
        (lambda held, new: View(held, held, new[1:]), ValueError),
        (lambda held, new: View(held, held, [*new, 0]), ValueError),
        (lambda held, new: View(held, held, new, query_positions=new[1:]), ValueError),
        (lambda held, new: View(held, held, new, log_weights=[0.0, *held]), ValueError),
        (lambda held, new: None, TypeError),
        (lambda held, new: (held, held, new), TypeError),
    ],
    ids=["not held", "own", "positions", "own short", "own long", "queries", "weights", "None", "tuple"],
)
def test_wrong_view_names_the_layout_and_restores_processors(view, error):
    class Mine(Layout):
        def view(self, held, new, pass_):
            return view(held, new) if new[0] == CHUNK else super().view(held, new, pass_)

    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    with pytest.raises(error, match=r"`Mine.view` must be a View for the latent frames 3 to 5: frames of \[0, 1, 2\]"):
        roll(pipe, noise(3), layout=Mine())
    assert processors(pipe.transformer) == before
    assert torch.equal(roll(pipe, noise(3)).frames, roll(latent_pipeline(), noise(3)).frames)


# Sink collapse


def long_run(num_frames, **settings):
    """Two chunks of a long video on a grid of one token."""
    pipe, half = latent_pipeline(), num_frames // 2
    roll(
        pipe,
        randn(1, 4, num_frames, 2, 2),
        height=16,
        width=16,
        chunk_partition=[half, num_frames - half],
        num_inference_steps=1,
        **settings,
    )


WARNED = {"window_size": 80, "num_sink_frames": 3}


@pytest.mark.parametrize(
    ("num_frames", "settings", "warns"),
    [
        (121, WARNED, True),
        (121, {**WARNED, "relative_positions": False}, True),
        (121, {"layout": {"window": WARNED}}, True),
        (120, WARNED, False),
        (121, {**WARNED, "relative_positions": True}, False),
        (121, {"window_size": 80}, False),
        (121, {"num_sink_frames": 3}, False),  # all of the past is read: the sink is nothing special
    ],
    ids=str,
)
def test_sink_at_absolute_positions_of_a_long_video_warns(num_frames, settings, warns, caplog):
    with caplog.at_level(logging.WARNING, logger="tokentrim.plan"):
        long_run(num_frames, **settings)
    messages = [record.getMessage() for record in caplog.records if record.name == "tokentrim.plan"]
    assert len(messages) == warns
    assert all("beyond 120 latent frames" in each and "relative_positions=True" in each for each in messages)


# In the cache


class Fixed(Layout):
    """Returns one view for the current pass."""

    def __init__(self, **fields):
        self.fields = fields

    def view(self, held, new, pass_):
        view = {"frames": held, "positions": held, "own_positions": new}
        return View(**(view if pass_.kind == "commit" else {**view, **self.fields}))


def write(cache, seed=0):
    key, value = randn(2, cache.num_videos, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=seed)
    cache.begin_pass(CHUNK, COMMIT)
    with cache.writing():
        cache.update(0, key, value)
    return key, value


def attend(cache, query, key, value):
    """The output of a layer's processor for the queries, keys and values of a pass."""
    stock = tiny_transformer().blocks[0].attn1.processor
    keys, values, mask = cache.update(0, key, value)
    return CachedSelfAttnProcessor(cache, 0, stock).attend(cache.rotate_queries(query), keys, values, mask)


def written_out(query, keys, values, weights):
    """Attention in which each key counts `weights` times: (rows, seq, heads, head_dim), weights (rows, keys)."""
    scores = (torch.einsum("bqhd,bkhd->bhqk", query, keys) / HEAD_DIM**0.5).exp() * weights[:, None, None, :]
    return torch.einsum("bhqk,bkhd->bqhd", scores / scores.sum(dim=-1, keepdim=True), values)


@pytest.mark.parametrize("num_videos", [1, 2])
def test_log_weights_equal_repeated_keys(num_videos):
    """exp(w) for each past frame, 1 for the pass's own frames; also if videos have lost different tokens."""
    log_weights = [0.0, -0.5, 1.0, -2.0, 0.25, 3.0]
    cache = RollingKVCache(GRID, ROPE_DIMS, num_videos, layout=Fixed(log_weights=log_weights))
    (key_a, value_a), (key_b, value_b) = write(cache, 1), write(cache, 2)
    cache.evict({num_videos - 1: [1, 4]})
    cache.begin_pass(CHUNK, DENOISE)
    query, key, value = randn(3, num_videos, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    weights = torch.tensor([*log_weights, 0.0, 0.0, 0.0]).exp().repeat_interleave(NUM_TOKENS).repeat(num_videos, 1)
    weights[-1, : 6 * NUM_TOKENS].view(6, NUM_TOKENS)[:, [1, 4]] = 0
    keys = torch.cat([rope(torch.cat([key_a, key_b], dim=1), range(6)), rope(key, range(6, 9))], dim=1)
    values = torch.cat([value_a, value_b, value], dim=1)
    expected = written_out(rope(query, range(6, 9)), keys, values, weights)
    torch.testing.assert_close(attend(cache, query, key, value), expected, atol=1e-5, rtol=0)


def test_log_weights_belong_to_frames_in_the_order_of_the_view():
    """Frames out of order, at other positions."""
    layout = Fixed(frames=[4, 0, 2], positions=[1, 5, 0], own_positions=[6, 7, 8], log_weights=[1.0, -1.0, 0.5])
    cache = RollingKVCache(GRID, ROPE_DIMS, 1, layout=layout)
    pairs = [write(cache, 1), write(cache, 2)]
    cache.begin_pass(CHUNK, DENOISE)
    query, key, value = randn(3, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    past_key, past_value = (
        torch.cat(each, dim=1).unflatten(1, (6, NUM_TOKENS))[:, [4, 0, 2]].flatten(1, 2) for each in zip(*pairs)
    )
    weights = torch.tensor([[1.0, -1.0, 0.5, 0.0, 0.0, 0.0]]).exp().repeat_interleave(NUM_TOKENS, dim=1)
    keys = torch.cat([rope(past_key, [1, 5, 0]), rope(key, [6, 7, 8])], dim=1)
    expected = written_out(rope(query, [6, 7, 8]), keys, torch.cat([past_value, value], dim=1), weights)
    torch.testing.assert_close(attend(cache, query, key, value), expected, atol=1e-5, rtol=0)


def test_query_positions_move_only_queries():
    query, key, value = randn(3, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    read = []
    for fields in ({}, {"query_positions": [3, 4, 5]}, {"query_positions": [6, 7, 8]}):
        cache = RollingKVCache(GRID, ROPE_DIMS, 1, layout=Fixed(**fields))
        write(cache, 1), write(cache, 2)
        cache.begin_pass(CHUNK, DENOISE)
        keys, values, mask = cache.update(0, key, value)
        assert mask is None
        read.append((cache.rotate_queries(query), keys, values))
    (queries, *past), (moved, *same), (unmoved, *_) = read
    assert all(torch.equal(one, other) for one, other in zip(past, same))
    torch.testing.assert_close(moved, rope(query, [3, 4, 5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(queries, rope(query, [6, 7, 8]), atol=1e-5, rtol=0)
    assert torch.equal(queries, unmoved)


def test_weight_one_changes_nothing_and_tiny_weight_hides_a_frame():
    """In a whole rollout."""

    class Weighted(Layout):
        def __init__(self, weight, reads):
            self.weight, self.reads = weight, reads

        def view(self, held, new, pass_):
            frames = held if self.reads else held[1:]
            weights = [self.weight if frame == 0 else 0.0 for frame in frames]
            return View(frames, frames, new, log_weights=weights)

    latents = noise(4)
    everything, one, nothing, without = (
        roll(latent_pipeline(), latents, layout=layout, method="plain").frames
        for layout in (Layout(), Weighted(0.0, True), Weighted(-1e4, True), Weighted(0.0, False))
    )
    torch.testing.assert_close(one, everything, atol=1e-5, rtol=0)
    torch.testing.assert_close(nothing, without, atol=1e-5, rtol=0)
    assert not torch.allclose(everything, without, atol=1e-3)


@pytest.mark.parametrize("num_videos", [1, 2])
def test_a_frame_may_be_read_again_at_another_position(num_videos):
    """Also if videos have lost different tokens."""
    frames, positions = [4, 0, 4, 5, 0], [1, 5, 2, 0, 3]
    cache = RollingKVCache(GRID, ROPE_DIMS, num_videos, layout=Fixed(frames=frames, positions=positions))
    pairs = [write(cache, 1), write(cache, 2)]
    cache.evict({num_videos - 1: [1, 4]})
    cache.begin_pass(CHUNK, DENOISE)
    query, key, value = randn(3, num_videos, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    past_key, past_value = (
        torch.cat(each, dim=1).unflatten(1, (6, NUM_TOKENS))[:, frames].flatten(1, 2) for each in zip(*pairs)
    )
    weights = torch.ones(num_videos, 8 * NUM_TOKENS)
    weights[-1, : 5 * NUM_TOKENS].view(5, NUM_TOKENS)[:, [1, 4]] = 0
    keys = torch.cat([rope(past_key, positions), rope(key, [6, 7, 8])], dim=1)
    expected = written_out(rope(query, [6, 7, 8]), keys, torch.cat([past_value, value], dim=1), weights)
    torch.testing.assert_close(attend(cache, query, key, value), expected, atol=1e-5, rtol=0)
