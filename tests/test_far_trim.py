"""Trimming AnyFlow-FAR: evicted tokens leave both parts of its context, and nothing else changes."""

import pytest
import torch
from builders import embeds, far_noise, far_pipeline, held_tokens, tiny_far, triggers
from contract import EAGER
from oracle_far import oracle_far

from tokentrim.tokentrim_backbones.far import FARBackbone


PARTITION = [1, 2, 2, 2, 2, 2, 2, 1]
SIZE = {"num_inference_steps": 2, "output_type": "latent"}


def shifted(sigmas, shift=5.0):
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]


def held_parts(backbone):
    """The full and the compressed tokens that video 0 can attend to."""
    held, num_full = held_tokens(backbone.cache), backbone.cache.tokens_per_frame
    full = [(frame, token) for frame, token in held if token < num_full]
    return [full, [(frame, token - num_full) for frame, token in held if token >= num_full]]


def roll_far(pipe, partition, latents, text=None, **settings):
    """The output, and the tokens of video 0 in the cache after each generated chunk: full and compressed."""
    held = []

    def on_chunk(index, chunk, decisions):
        held.append(held_parts(pipe.transformer.blocks[0].attn1.processor.backbone))

    text = embeds(len(latents)) if text is None else text
    output = pipe(
        latents=latents, prompt_embeds=text, chunk_partition=partition, on_chunk=on_chunk, **{**SIZE, **settings}
    )
    return output, held


def compare(transformer, partition=PARTITION, num_given=0, protect=True, guided=None, **settings):
    latents, given = far_noise(sum(partition), seed=3), far_noise(sum(partition[:num_given]), seed=4)
    if num_given:
        settings |= {"video_latents": given.transpose(1, 2), "protect_conditioning": protect}
    output, held = roll_far(far_pipeline(transformer), partition, latents, **settings)
    shared = {k: v for k, v in settings.items() if k not in ("video_latents", "protect_conditioning", "method")}
    protected = max(sum(partition[:num_given]) * protect, settings.get("num_sink_frames", 0))
    expected, attempts, left = oracle_far(
        transformer,
        latents.split(partition, dim=2),
        embeds(),
        shifted([1.0, 0.5]),
        given=given.split(partition[:num_given], dim=2) if num_given else (),
        num_protected_frames=protected,
        trims=settings.get("method") != "plain",
        **shared,
    )
    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    evicted = [sorted({t for _, tokens in tries[:-1] for t in tokens}) for tries in attempts]
    assert [decision["tokens"] for decision in output.decisions[0]] == evicted
    assert held[:-1] == left[num_given:-1]
    return output, held


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "plain"},
        EAGER,
        {**EAGER, "max_regenerations": 2},
        {**EAGER, "pad_keys": False},
        {**EAGER, "num_sink_frames": 3},
        {**EAGER, "window_size": 8},
        {**EAGER, "window_size": 9, "num_sink_frames": 2},
        {**EAGER, "num_given": 2},
        {**EAGER, "num_given": 2, "protect": False},
    ],
    ids=str,
)
def test_rollout_equals_the_written_out_history(settings):
    output, held = compare(tiny_far(), **settings)
    assert bool(triggers(output.decisions[0])) == ("method" not in settings)


@pytest.mark.parametrize(
    "config", [{"full_chunk_limit": 2}, {"full_chunk_limit": 5}, {"deltatime_type": "t-r"}], ids=str
)
def test_rollout_of_other_models_equals_the_written_out_history(config):
    output, _ = compare(tiny_far(**config), **EAGER)
    assert triggers(output.decisions[0])


FULL, COMPRESSED = set(range(24)), set(range(6))  # a frame of 8 x 12 latents: grids of 4 x 6 and 2 x 3 tokens
CORRUPT = {8, 9, 11}  # of the full grid; two of compressed token 1 (2, 3, 8, 9), and one of token 2 (4, 5, 10, 11)


def steady(num_chunks, batch=1):
    """Nearly the same noise for every chunk of 2 latent frames."""
    return far_noise(2, batch).repeat(1, 1, num_chunks, 1, 1) + 0.05 * far_noise(2 * num_chunks, batch, seed=1)


def corrupting(pipe, chunks, first=0):
    """A callback that spoils the full tokens CORRUPT of some finished chunks, at every attempt."""

    def callback(pipe, step, timestep, tensors):
        latents = tensors["latents"].clone()
        if step == 1 and pipe.transformer.blocks[0].attn1.processor.cache.next_frame // 2 in chunks:
            for token in CORRUPT:
                top, left = 2 * (token // 6), 2 * (token % 6)
                latents[first:, :, :, top : top + 2, left : left + 2] += 8
        return {"latents": latents}

    return callback


def by_frame(tokens):
    return {frame: {token for of, token in tokens if of == frame} for frame, _ in tokens}


def test_a_corrupt_region_is_evicted_from_both_parts_of_the_cache():
    """Chunk 3 is spoilt, so earlier chunks lose their tokens at its place for good."""
    pipe = far_pipeline()
    output, held = roll_far(pipe, [2] * 8, steady(8), prune_fraction=0.125, callback_on_step_end=corrupting(pipe, [3]))
    assert triggers(output.decisions[0]) == [3] and output.decisions[0][3]["tokens"] == sorted(CORRUPT)

    def expected(full, compressed):
        frames = [
            {2 * chunk + i: tokens for chunk, tokens in part.items() for i in (0, 1)} for part in (full, compressed)
        ]
        return frames

    whole, pruned = FULL, FULL - CORRUPT
    found = [[by_frame(part) for part in parts] for parts in held]
    assert found[0] == expected({0: whole}, {})
    assert found[1] == expected({0: whole, 1: whole}, {})
    assert found[2] == expected({1: whole, 2: whole}, {0: COMPRESSED})
    # Chunk 3 evicts: chunk 2 loses the full tokens; chunk 0, compressed before, and chunk 1, compressed now, lose the
    # compressed token of which half are gone, and keep the one of which a quarter is.
    assert found[3] == expected({2: pruned, 3: whole}, {0: COMPRESSED - {1}, 1: COMPRESSED - {1}})
    # Chunk 2 is encoded again and becomes compressed; chunk 3 itself is whole.
    assert found[4] == expected({3: whole, 4: whole}, {chunk: COMPRESSED - {1} for chunk in (0, 1, 2)})
    left = {chunk: COMPRESSED - {1} for chunk in (0, 1, 2)} | {3: COMPRESSED}
    assert found[5] == expected({4: whole, 5: whole}, left)
    assert found[6] == expected({5: whole, 6: whole}, left | {4: COMPRESSED})


def test_evictions_of_a_compressed_token_add_up():
    """One full token of four is evicted, later another: then half have left."""
    backbone = FARBackbone(tiny_far(full_chunk_limit=2), grid=(4, 6), num_videos=1)

    def commit():
        backbone.make_room(1)
        with torch.no_grad(), backbone.attached():
            backbone.commit(far_noise(1), embeds(), [True])

    commit()
    commit()
    backbone.evict({0: [2]})
    assert held_parts(backbone) == [
        [(1, token) for token in range(24) if token != 2],
        [(0, token) for token in range(6)],
    ]
    backbone.evict({0: [9]})
    assert held_parts(backbone)[1] == [(0, token) for token in range(6) if token != 1]
    commit()
    assert held_parts(backbone) == [
        [(2, token) for token in range(24)],
        [(frame, token) for frame in (0, 1) for token in range(6) if token != 1],
    ]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("protect", [True, False])
def test_conditioning_frames_are_protected(kind, protect):
    num_given = 1 if kind == "image" else 2
    pipe, latents = far_pipeline(), steady(8)
    given = latents[:, :, : 2 * num_given].transpose(1, 2)
    _, held = roll_far(
        pipe,
        [2] * 8,
        latents,
        video_latents=given,
        protect_conditioning=protect,
        prune_fraction=0.125,
        drift_sensitivity=0.0,
        warmup_chunks=1,
        callback_on_step_end=corrupting(pipe, [5, 6]),
    )
    full, compressed = (by_frame(part) for part in held[-2])
    assert all(compressed[frame] == (COMPRESSED if protect else compressed[frame]) for frame in range(2 * num_given))
    assert any(compressed[frame] < COMPRESSED for frame in compressed if frame >= 2 * num_given)
    if not protect:
        assert all(compressed[frame] < COMPRESSED for frame in range(2 * num_given))


@pytest.mark.parametrize("settings", [{}, {"drift_signal": "first_step"}, {"window_size": 8}], ids=str)
def test_a_batch_equals_single_runs(settings):
    """Only the second video is spoilt, so only this video is regenerated and pruned."""
    transformer, latents, text = tiny_far(), steady(8, batch=2), embeds(2)
    settings = {"guidance_scale": 2.0, **EAGER, **settings}
    negative = embeds(2, seed=5)
    batch, _ = roll_far(far_pipeline(transformer), [2] * 8, latents, text, negative_prompt_embeds=negative, **settings)
    for video in range(2):
        one = slice(video, video + 1)
        single, _ = roll_far(
            far_pipeline(transformer),
            [2] * 8,
            latents[one],
            text[one],
            negative_prompt_embeds=negative[one],
            **settings,
        )
        torch.testing.assert_close(batch.frames[one], single.frames, atol=2e-5, rtol=0)
        assert triggers(batch.decisions[video]) == triggers(single.decisions[0])
    assert triggers(batch.decisions[0]) != triggers(batch.decisions[1])


def test_a_gate_that_never_triggers_changes_no_bit():
    shut, open_ = (
        roll_far(far_pipeline(), PARTITION, far_noise(14), **settings)[0]
        for settings in ({"method": "plain"}, {"drift_sensitivity": 1e6})
    )
    assert torch.equal(shut.frames, open_.frames)


def test_chunk_is_not_regenerated_if_nothing_can_leave():
    """All frames belong to the sink."""
    trimmed, plain = (
        roll_far(far_pipeline(), PARTITION, far_noise(14, seed=3), num_sink_frames=14, **settings)[0]
        for settings in (EAGER, {"method": "plain"})
    )
    assert trimmed.decisions[0][5]["severity"] and not triggers(trimmed.decisions[0])
    assert torch.equal(trimmed.frames, plain.frames)


def test_empty_context_equals_no_context():
    """Attention over masked keys only, in the context pass of a chunk that lost all tokens, gives no NaN."""
    transformer, text = tiny_far(), embeds(2)
    *chunks, noisy = far_noise(10, batch=2).split(2, dim=2)
    times = torch.tensor([[800.0], [400.0]])

    def flow(past, evicting):
        backbone = FARBackbone(transformer, (4, 6), num_videos=2)
        with torch.no_grad(), backbone.attached():
            for chunk in past:
                backbone.make_room(2)
                assert backbone.commit(chunk, text, [True, True])
                backbone.evict({video: range(24) for video in evicting})
            backbone.make_room(2)
            return backbone.predict_flow(noisy, [2], *times, text)

    alone, whole = flow([], []), flow(chunks, [])
    torch.testing.assert_close(flow(chunks, [0, 1]), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow(chunks, [1]), torch.stack([whole[0], alone[1]]), atol=1e-5, rtol=0)
