"""Which tokens the cache holds, at which positions, and how it reports them."""

import pytest
import torch
from builders import CHUNK, NUM_TOKENS, begin_pass, held_tokens, latent_pipeline, randn, roll, rope, tiny_transformer

from tokentrim import RollingKVCache, WindowLayout
from tokentrim.tokentrim_backbones.wan import rotary_dims


GRID = (2, 3)
HEAD_DIM = 12
ROPE_DIMS = (4, 4, 4)


def new_cache(num_videos=1, num_protected_frames=0, **window):
    return RollingKVCache(GRID, ROPE_DIMS, num_videos, WindowLayout(**window), num_protected_frames)


def write(cache, num_frames=CHUNK, rows=None, seed=0):
    """Commit a chunk of random keys and values in one layer; returns them."""
    rows = cache.num_videos if rows is None else rows
    key, value = randn(2, rows, num_frames * NUM_TOKENS, 2, HEAD_DIM, seed=seed)
    begin_pass(cache, num_frames, "commit")
    with cache.writing():
        cache.update(0, key, value)
    return key, value


def frames_held(cache, video=0):
    return sorted({frame for frame, _ in held_tokens(cache, video)})


def test_rotary_dims_are_the_transformers():
    assert rotary_dims(tiny_transformer(head_dim=HEAD_DIM)) == ROPE_DIMS


@pytest.mark.parametrize(
    "window_size, num_sink_frames, kept_for_chunk_4",
    [
        (None, 0, list(range(12))),
        (None, 2, list(range(12))),
        (3, 0, []),
        (6, 0, [9, 10, 11]),
        (7, 0, [8, 9, 10, 11]),
        (9, 3, [0, 1, 2, 9, 10, 11]),
        (5, 1, [0, 11]),
        (4, 1, [0]),
        (30, 3, list(range(12))),
    ],
)
def test_window_and_sink(window_size, num_sink_frames, kept_for_chunk_4):
    cache = new_cache(window_size=window_size, num_sink_frames=num_sink_frames)
    for _ in range(4):
        write(cache)
    begin_pass(cache, CHUNK)
    assert held_tokens(cache) == [(frame, token) for frame in kept_for_chunk_4 for token in range(NUM_TOKENS)]


def test_window_counts_the_current_chunk():
    cache = new_cache(window_size=6)
    for num_frames in (2, 3, 1):
        write(cache, num_frames)
    begin_pass(cache, 4)
    assert frames_held(cache) == [4, 5]
    cache = new_cache(window_size=6)
    for num_frames in (2, 3, 1):
        write(cache, num_frames)
    begin_pass(cache, 1)
    assert frames_held(cache) == [1, 2, 3, 4, 5]


def test_protected_frames_are_safe_from_eviction_not_from_the_window():
    cache = new_cache(num_sink_frames=1, window_size=7, num_protected_frames=3)
    write(cache)
    write(cache)
    cache.evict({0: range(NUM_TOKENS)})
    assert frames_held(cache) == [0, 1, 2]
    write(cache)
    assert frames_held(cache) == [0, 6, 7, 8]
    assert new_cache(num_sink_frames=4, num_protected_frames=3).num_protected_frames == 4


def test_eviction_removes_grid_tokens_from_all_frames_but_the_sink():
    cache = new_cache(num_videos=2, num_sink_frames=2)
    write(cache)
    write(cache)
    cache.evict({1: [0, 4]})
    everything = [(frame, token) for frame in range(6) for token in range(NUM_TOKENS)]
    assert held_tokens(cache, 0) == everything
    assert held_tokens(cache, 1) == [(f, t) for f, t in everything if f < 2 or t not in (0, 4)]
    write(cache)  # what is written later is whole, what was pruned stays pruned
    assert held_tokens(cache, 1)[-3 * NUM_TOKENS :] == [(f, t) for f in (6, 7, 8) for t in range(NUM_TOKENS)]
    assert (2, 0) not in held_tokens(cache, 1)


def test_update_returns_exactly_the_held_keys_and_values_in_order():
    """Also after window, sink and eviction have moved them."""
    cache = new_cache(num_videos=2, window_size=8, num_sink_frames=1)
    written = [write(cache, rows=4, seed=seed) for seed in range(3)]  # two videos in two guidance branches
    cache.evict({0: [1, 2], 1: [5]})
    begin_pass(cache, CHUNK)
    key, value = randn(2, 4, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    keys, values, mask = cache.update(0, key, value)
    for row in range(4):
        held = held_tokens(cache, row % 2)
        attended = mask[row, 0, 0]
        assert attended.sum() == len(held) + CHUNK * NUM_TOKENS
        for read, chunks, current in ((keys, 0, key), (values, 1, value)):
            past = torch.cat([pair[chunks][row] for pair in written])
            expected = past[[frame * NUM_TOKENS + token for frame, token in held]]
            if read is keys:
                frames = range(9)
                rotated = rope(past[None], frames)[0]
                expected = rotated[[frame * NUM_TOKENS + token for frame, token in held]]
                current = rope(current, range(9, 12))
            expected = torch.cat([expected, current[row]])
            torch.testing.assert_close(read[row][attended], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "num_chunks, window_size, num_sink_frames, held, positions, chunk_positions",
    [
        (2, None, 0, range(6), range(6), range(6, 9)),
        (2, 9, 3, range(6), range(6), range(6, 9)),  # no gap between sink and recent frames: as absolute
        (4, 9, 3, [0, 1, 2, 9, 10, 11], range(6), range(6, 9)),
        (4, 8, 1, [0, 8, 9, 10, 11], range(5), range(5, 8)),
        (4, 6, 0, [9, 10, 11], range(3), range(3, 6)),
    ],
)
def test_relative_positions(num_chunks, window_size, num_sink_frames, held, positions, chunk_positions):
    """The sink stands directly before the recent frames, and these directly before the chunk, counted from 0. Queries
    meet keys at these positions."""
    cache = new_cache(window_size=window_size, num_sink_frames=num_sink_frames, relative_positions=True)
    written = torch.cat([write(cache, seed=seed)[0] for seed in range(num_chunks)], dim=1)
    begin_pass(cache, CHUNK)
    assert frames_held(cache) == list(held)
    key, value = randn(2, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    keys, _, _ = cache.update(0, key, value)
    of_held = written.unflatten(1, (-1, NUM_TOKENS))[:, list(held)].flatten(1, 2)
    expected = torch.cat([rope(of_held, list(positions)), rope(key, list(chunk_positions))], dim=1)
    pairs = (cache.rotate_queries(key), keys), (rope(key, list(chunk_positions)), expected)
    torch.testing.assert_close(*(torch.einsum("bqhd,bkhd->bhqk", *pair) for pair in pairs), atol=1e-5, rtol=0)


def test_relative_positions_keep_gaps_of_evicted_tokens():
    """A frame that lost some or all tokens keeps its position."""
    cache = new_cache(window_size=9, relative_positions=True)
    key, _ = write(cache)
    cache.evict({0: range(NUM_TOKENS)})
    later, _ = write(cache, seed=1)
    begin_pass(cache, CHUNK)
    keys, _, _ = cache.update(0, *randn(2, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9))
    torch.testing.assert_close(keys[:, : later.shape[1]], rope(later, [3, 4, 5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [1_000, 100_000])
def test_only_distances_between_positions_matter(offset):
    """Far beyond the 1024 frames of the transformer's table."""
    products = []
    for start in (0, offset):
        cache = new_cache(window_size=9)
        cache.next_frame = start
        for seed in range(3):
            write(cache, seed=seed)
        begin_pass(cache, CHUNK)
        query, key, value = randn(3, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
        keys, _, _ = cache.update(0, key, value)
        products.append(torch.einsum("bqhd,bkhd->bhqk", cache.rotate_queries(query), keys))
    torch.testing.assert_close(*products, atol=1e-5, rtol=0)


def test_rollout_of_more_latent_frames_than_the_rope_table():
    """Without a sink, positions in the window and in the video differ only by a shift."""
    latents = randn(1, 4, 1100, 2, 2, seed=3)
    settings = {"num_frames_per_chunk": 50, "window_size": 110, "num_inference_steps": 1, "height": 16, "width": 16}
    absolute, relative = (
        roll(latent_pipeline(), latents, relative_positions=relative, **settings).frames for relative in (False, True)
    )
    assert absolute.shape == latents.shape
    torch.testing.assert_close(absolute, relative, atol=1e-4, rtol=0)


def test_version_changes_exactly_with_the_context():
    cache = new_cache(num_videos=2, window_size=9, num_sink_frames=3)
    versions = [cache.version]

    def changed(action, *args):
        action(*args)
        versions.append(cache.version)
        return versions[-1] != versions[-2]

    assert not changed(begin_pass, cache, CHUNK)
    assert changed(write, cache)
    assert not changed(cache.evict, {0: [1, 2]})  # all of it is sink
    assert changed(write, cache)
    assert not changed(begin_pass, cache, CHUNK)  # still fits the window
    assert not changed(cache.update, 0, *randn(2, 2, CHUNK * NUM_TOKENS, 2, HEAD_DIM))
    assert not changed(cache.evict, {})
    assert not changed(cache.evict, {0: []})
    assert changed(cache.evict, {0: [1, 2]})
    assert not changed(cache.evict, {0: [1, 2]})  # already gone
    assert not changed(cache.forget_prompt)
    assert changed(write, cache)
    assert changed(begin_pass, cache, CHUNK)  # the window rolls
    assert len(set(versions)) == 6


def test_keys_are_held_once_and_read_in_place():
    """No pass copies the past, whatever its window, and a commit's tokens stay where the pass wrote them."""
    cache = new_cache(window_size=9, num_sink_frames=3, relative_positions=True)
    for seed in range(5):
        write(cache, seed=seed)
    begin_pass(cache, CHUNK)
    layer = cache.layer(0)
    memory = [table.untyped_storage().data_ptr() for table in (layer.key, layer.value)]
    for _ in range(2):
        read = cache.update(0, *randn(2, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM))[:2]
        assert [table.untyped_storage().data_ptr() for table in read] == memory
    assert (
        layer.key.shape[1] == 9 * NUM_TOKENS and layer.original.shape[1] == 3 * NUM_TOKENS
    )  # the sink alone is rotated
    assert layer.original.shape[3] == ROPE_DIMS[0]  # and of it what stands for time
    write(cache)
    assert [table.untyped_storage().data_ptr() for table in (layer.key, layer.value)] == memory


@pytest.mark.parametrize(("window_size", "sizes"), [(6, [1, 2, 4, 4, 6]), (None, [1, 2, 4, 4, 8])])
def test_memory_grows_by_doubling_up_to_the_window(window_size, sizes):
    cache, seen = new_cache(window_size=window_size), []
    for _ in sizes:
        write(cache, 1)
        seen.append(cache.layer(0).key.shape[1] // NUM_TOKENS)
    assert seen == sizes


def test_saved_context_does_not_change_later():
    cache = new_cache(window_size=9)
    write(cache)
    state = cache.state_dict()
    kept = [table.clone() for table in state["layers_at_home"][0][:2]]
    for seed in range(4):
        write(cache, seed=seed)
    cache.evict({0: [1, 2]})
    assert all(torch.equal(one, other) for one, other in zip(state["layers_at_home"][0], kept))


def test_writing_is_all_or_nothing():
    cache = new_cache()
    write(cache)
    before = held_tokens(cache), cache.version, cache.next_frame
    begin_pass(cache, CHUNK)
    probe = randn(2, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    keys_before = cache.update(0, *probe)[0].clone()
    with pytest.raises(KeyboardInterrupt):
        with cache.writing():
            cache.update(0, *randn(2, 1, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=4))
            raise KeyboardInterrupt
    assert (held_tokens(cache), cache.version, cache.next_frame) == before
    torch.testing.assert_close(cache.update(0, *probe)[0], keys_before, atol=0, rtol=0)


def test_only_reads_the_rows_of_the_chosen_videos():
    cache = new_cache(num_videos=3)
    write(cache, rows=6)
    cache.evict({0: [1], 2: [1, 2]})
    begin_pass(cache, CHUNK)
    key, value = randn(2, 6, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    everything = cache.update(0, key, value)
    rows = [0, 2, 3, 5]  # videos 0 and 2 in both branches
    with cache.only([0, 2]):
        some = cache.update(0, key[rows], value[rows])
    for whole, part in zip(everything, some):
        torch.testing.assert_close(part, whole[rows], atol=0, rtol=0)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_loaded_context_reads_the_same_bits(used, tmp_path):
    """Also if it replaces another context."""
    settings = {"window_size": 8, "num_sink_frames": 1, "relative_positions": True}
    cache, other = (new_cache(num_videos=2, **settings) for _ in range(2))
    for seed in range(3):
        write(cache, rows=4, seed=seed)
    cache.evict({0: [1, 2], 1: [5]})
    if used:
        write(other, rows=4, seed=5)
        begin_pass(other, CHUNK)
        other.update(0, *randn(2, 4, CHUNK * NUM_TOKENS, 2, HEAD_DIM))
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    state = torch.load(tmp_path / "cache.pt", weights_only=True)
    other.load_state_dict(state, num_rows=4, num_layers=1, head=(2, HEAD_DIM))
    probe = randn(2, 4, CHUNK * NUM_TOKENS, 2, HEAD_DIM, seed=9)
    for each in (cache, other):
        begin_pass(each, CHUNK)
    assert [held_tokens(other, video) for video in range(2)] == [held_tokens(cache, video) for video in range(2)]
    assert (other.frames, other.next_frame) == (cache.frames, cache.next_frame)
    for ours, theirs in zip(other.update(0, *probe), cache.update(0, *probe)):
        assert torch.equal(ours, theirs)
