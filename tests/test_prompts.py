# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Prompts over time: schedules, and the effect of each transition on the context, against forwards over the whole
past."""

import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    NUM_TOKENS,
    TEXT_DIM,
    TEXT_LENGTH,
    embeds,
    far_components,
    full_pipeline,
    held_tokens,
    latent_pipeline,
    noise,
    quiet,
    rope,
    tiny_transformer,
)
from oracle import MaskedAttnProcessor, placed_flow

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_views.layout import CUT_JUMP


PROMPT, OTHER, THIRD = "a red circle moving right over a blue background", "a green square", "a blue circle"
SIGMAS = [1.0, 5 * 0.5 / (1 + 4 * 0.5), 0.0]  # 2 steps, shift 5


# The slow way


def flow_with_texts(transformer, parts, texts):
    """Flow of the last of `parts`, as in `placed_flow`; each part reads its own text."""
    lengths = [latents.shape[2] * NUM_TOKENS for latents, *_ in parts]
    mask = torch.block_diag(*(torch.ones(length, text.shape[1]) for length, text in zip(lengths, texts))).bool()
    stock = [block.attn2.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn2.set_processor(MaskedAttnProcessor(mask[None, None]))
    try:
        return placed_flow(transformer, parts, torch.cat(texts, dim=1))
    finally:
        for block, processor in zip(transformer.blocks, stock):
            block.attn2.set_processor(processor)


def slow_rollout(transformer, noises, texts, transitions, window_size=100, num_sink_frames=0):
    """Plain rollout with a text for each chunk, and transitions by chunk; absolute positions."""
    parts, texts_of, outputs = [], [], []  # of the past: what `placed_flow` takes, and the text of each; clean chunks
    held = torch.zeros(0, dtype=torch.bool)  # tokens of all frames so far
    for index, (latents, text) in enumerate(zip(noises, texts)):
        first, size = index * CHUNK, latents.shape[2]
        frame = torch.arange(len(held)) // NUM_TOKENS
        transition = transitions.get(index, "keep")
        if transition in ("flush", "cut"):
            held = held & ((frame < num_sink_frames) | (frame >= first - 2))
        if transition == "recache":
            # All frames of the window together, each seeing all; a sink from which frames have left stays as it is.
            begin = 0 if held.all() else max(num_sink_frames, int(frame[held & (frame >= num_sink_frames)].min()))
            before, frames = torch.cat(outputs, dim=2).tensor_split([begin], dim=2)
            seen = held[: begin * NUM_TOKENS] & (frame[: begin * NUM_TOKENS] < num_sink_frames)
            if num_sink_frames == 0 and begin > 0:  # they have left: nobody sees them
                parts, texts_of = [(before, 0, [0.0] * begin, torch.zeros(0, dtype=torch.bool))], texts_of[:1]
            kept = [at for at, (_, start, *_) in enumerate(parts) if start < begin]
            parts = [parts[at] for at in kept] + [(frames, begin, [0.0] * frames.shape[2], seen)]
            texts_of = [texts_of[at] for at in kept] + [text]
        oldest = first - max(window_size - num_sink_frames - size, 0)
        held = held & ((frame < num_sink_frames) | (frame >= oldest))
        jump = CUT_JUMP if transition == "cut" else 0
        for sigma, following in zip(SIGMAS, SIGMAS[1:]):
            own = (latents, first + jump, [1000 * sigma] * size, held)
            flow = flow_with_texts(transformer, [*parts, own], [*texts_of, text])
            latents = latents + (following - sigma) * flow
        parts.append((latents, first + jump, [0.0] * size, held))
        texts_of.append(text)
        held = torch.cat([held, torch.ones(size * NUM_TOKENS, dtype=torch.bool)])
        outputs.append(latents)
    return torch.cat(outputs, dim=2)


def texts_by_chunk(num_chunks, changes, blend_chunks=0):
    """Embeddings of each chunk: `changes` by chunk, on a straight line over `blend_chunks`."""
    texts, old, new, since = [], None, embeds(seed=7), 0
    for index in range(num_chunks):
        if index in changes:
            old, new, since = texts[-1], changes[index], index
        step = index - since + 1
        share = 1.0 if old is None or step > blend_chunks else step / (blend_chunks + 1)
        texts.append(new if share == 1.0 else old + share * (new - old))
    return texts


def compare(num_chunks, changes, transition, blend_chunks=0, again=False, **window):
    changes = {chunk: embeds(seed=seed) for chunk, seed in changes.items()}
    transformer, latents = tiny_transformer(), noise(num_chunks, seed=3)
    output = latent_pipeline(transformer)(
        prompt_embeds=embeds(seed=7),
        latents=latents,
        output_type="latent",
        method="plain",
        num_inference_steps=2,
        prompt_schedule=changes,
        prompt_transition=transition,
        blend_chunks=blend_chunks,
        **window,
    )
    blended = [chunk + offset for chunk in changes for offset in range(blend_chunks + 1 if again else 1)]
    expected = slow_rollout(
        transformer,
        latents.split(CHUNK, dim=2),
        texts_by_chunk(num_chunks, changes, blend_chunks),
        dict.fromkeys(blended, transition),
        **window,
    )
    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    return expected


WINDOWS = [{}, {"window_size": 6}, {"window_size": 9}, {"window_size": 9, "num_sink_frames": 3}]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("transition", ["keep", "recache", "flush"])
def test_transitions_equal_forwards_over_all_of_the_past(transition, window):
    compare(5, {3: 8}, transition, **window)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_chunk_after_a_cut_stands_apart(window):
    """Keys are placed again in every pass, so later chunks see it in line."""
    cut = compare(4, {3: 8}, "cut", **window)
    flushed = slow_rollout(
        tiny_transformer(),
        noise(4, seed=3).split(CHUNK, dim=2),
        texts_by_chunk(4, {3: embeds(seed=8)}),
        {3: "flush"},
        **window,
    )
    assert (cut[:, :, -CHUNK:] - flushed[:, :, -CHUNK:]).abs().max() > 1e-3


@pytest.mark.parametrize("transition", ["keep", "recache", "flush"])
def test_two_changes_with_blending_equal_forwards_over_all_of_the_past(transition):
    compare(6, {1: 8, 4: 9}, transition, blend_chunks=2, again=transition == "recache", window_size=9)


def test_the_transitions_differ():
    videos = [compare(3, {2: 8}, transition) for transition in ("keep", "recache", "flush", "cut")]
    for number, video in enumerate(videos):
        for other in videos[:number]:
            torch.testing.assert_close(video[:, :, : 2 * CHUNK], other[:, :, : 2 * CHUNK])
            assert (video[:, :, 2 * CHUNK :] - other[:, :, 2 * CHUNK :]).abs().max() > 1e-4


# What is in the cache


def caches(transition, at=4, num_chunks=6, **others):
    """The state of the cache in the first step of each chunk, and the stream's chunks."""
    states, pipe = {}, latent_pipeline()

    def callback(pipe, step, timestep, tensors):
        cache = stream.run.backbone.cache
        states.setdefault(stream.index, (list(cache.frames), cache.state_dict()["layers_at_home"], held_tokens(cache)))
        return {}

    arguments = {"prompt_embeds": embeds(seed=7), "num_inference_steps": 2, "callback_on_step_end": callback}
    arguments |= {"latents": noise(num_chunks, seed=3), "output_type": "latent", "window_size": 12, "method": "plain"}
    arguments |= {"prompt_schedule": {at: embeds(seed=8)}, "prompt_transition": transition}
    stream = pipe.stream(**{**arguments, **others})
    return states, list(stream)


@pytest.mark.parametrize("num_sink_frames", [0, 1, 3])
@pytest.mark.parametrize("relative_positions", [False, True])
@pytest.mark.parametrize("transition", ["flush", "cut"])
def test_a_flush_leaves_the_sink_and_the_last_two_frames(transition, num_sink_frames, relative_positions):
    window = {"num_sink_frames": num_sink_frames, "relative_positions": relative_positions}
    states, _ = caches(transition, **window)
    kept, _ = caches("keep", **window)
    sink = list(range(num_sink_frames))
    assert states[4][0] == [*sink, 10, 11]
    assert states[5][0] == [*sink, 10, 11, 12, 13, 14]
    assert [states[chunk][0] for chunk in range(4)] == [kept[chunk][0] for chunk in range(4)]
    assert len(kept[4][0]) == 9


class Evicts(TokenTrimPipeline.ContextPolicy):
    """Evicts two tokens of the past of chunk 2."""

    def __init__(self):
        self.index = 0

    def review(self, draft):
        return (1, 4) if self.index == 2 else ()

    def close(self, entered):
        self.index += 1
        return {}


def test_keys_after_recache_are_those_of_one_masked_forward_over_the_window():
    """Under the new prompt at timestep 0; evicted tokens stay evicted and are not read."""
    states, chunks = caches("recache", at=3, num_chunks=4, method=[Evicts()])
    frames, layers, held = states[3]
    assert frames == list(range(9)) and len(held) == 9 * NUM_TOKENS - 2 * 6
    columns = [frame * NUM_TOKENS + token for frame, token in held]
    mask = torch.zeros(9 * NUM_TOKENS, 9 * NUM_TOKENS, dtype=torch.bool)
    mask[:, columns] = True

    transformer, seen = tiny_transformer(), {}
    for index, block in enumerate(transformer.blocks):
        block.attn1.set_processor(MaskedAttnProcessor(mask[None, None]))
        for name in ("norm_k", "to_v"):
            keep = lambda module, args, output, key=(index, name): seen.update({key: output})  # noqa: E731
            getattr(block.attn1, name).register_forward_hook(keep)
    latents = torch.cat([chunk.latents for chunk in chunks[:3]], dim=2)
    transformer(latents, torch.zeros(1), embeds(seed=8), return_dict=False)
    for index, (key, value, *_) in enumerate(layers):
        keys, values = (seen[index, name].unflatten(-1, (-1, 12)) for name in ("norm_k", "to_v"))
        for ours, expected in ((key, rope(keys, range(9))), (value, values)):
            torch.testing.assert_close(ours, expected[:, columns], atol=1e-5, rtol=0)


def test_a_sink_that_stands_apart_keeps_its_keys_through_recache():
    window = {"window_size": 9, "num_sink_frames": 3}
    (_, recached, held), (_, kept, _) = (caches(name, **window)[0][4] for name in ("recache", "keep"))
    sink = [at for at, (frame, _) in enumerate(held) if frame < 3]
    for (key, value, *_), (old_key, old_value, *_) in zip(recached, kept):
        for new, old in ((key, old_key), (value, old_value)):
            assert torch.equal(new[:, sink], old[:, sink])
    others = [at for at in range(len(held)) if at not in sink]
    assert (recached[1][0][:, others] - kept[1][0][:, others]).abs().max() > 1e-3


# Schedules


def settings(num_chunks=5, seeds=(0,), **others):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"num_frames": 4 * CHUNK * num_chunks - 3, "window_size": 9, "output_type": "latent"}
    return {"generator": generators if len(seeds) > 1 else generators[0], **size, **others}


def test_chunk_0_of_a_schedule_is_the_prompt():
    pipe, later = full_pipeline(), {2: OTHER}
    expected = pipe(PROMPT, prompt_schedule=later, **settings())
    output = pipe(prompt_schedule={0: PROMPT, **later}, **settings())
    torch.testing.assert_close(output.frames, expected.frames, atol=0, rtol=0)
    output = pipe(prompt_schedule=[{0: PROMPT, **later}], **settings())
    torch.testing.assert_close(output.frames, expected.frames, atol=0, rtol=0)
    with pytest.raises(ValueError, match="`prompt` must be None where `prompt_schedule` has chunk 0"):
        pipe(PROMPT, prompt_schedule={0: PROMPT, **later}, **settings())


def test_texts_and_their_embeddings_are_the_same_prompts():
    pipe = full_pipeline()
    encoded, _ = pipe.encode_prompt([OTHER], do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    videos = [pipe(PROMPT, prompt_schedule={2: prompt}, **settings()).frames for prompt in (OTHER, [OTHER], encoded)]
    for video in videos[1:]:
        torch.testing.assert_close(video, videos[0], atol=0, rtol=0)
    assert (videos[0] - pipe(PROMPT, **settings()).frames)[:, :, 2 * CHUNK :].abs().max() > 1e-3


def test_same_prompt_again_changes_nothing():
    pipe = full_pipeline()
    expected = pipe(PROMPT, **settings())
    output = pipe(PROMPT, prompt_schedule={2: PROMPT}, **settings())
    torch.testing.assert_close(output.frames, expected.frames, atol=0, rtol=0)
    assert output.decisions == expected.decisions


def test_transitions_may_differ_by_chunk():
    pipe, schedule = full_pipeline(), {1: OTHER, 3: THIRD}
    mixed = pipe(PROMPT, prompt_schedule=schedule, prompt_transition={3: "flush"}, **settings())
    kept = pipe(PROMPT, prompt_schedule=schedule, **settings())
    flushed = pipe(PROMPT, prompt_schedule=schedule, prompt_transition="flush", **settings())
    torch.testing.assert_close(mixed.frames[:, :, : 3 * CHUNK], kept.frames[:, :, : 3 * CHUNK], atol=0, rtol=0)
    assert (mixed.frames - kept.frames)[:, :, 3 * CHUNK :].abs().max() > 1e-4
    assert (mixed.frames - flushed.frames)[:, :, CHUNK : 2 * CHUNK].abs().max() > 1e-4


def test_videos_with_separate_schedules_equal_single_runs():
    pipe, schedules = full_pipeline(), [{2: THIRD}, {1: PROMPT, 3: THIRD}]
    trims = {"drift_sensitivity": 0.0, "warmup_chunks": 1}
    output = pipe([PROMPT, OTHER], prompt_schedule=schedules, **settings(seeds=(1, 2), **trims))
    for video, (prompt, schedule) in enumerate(zip((PROMPT, OTHER), schedules)):
        single = pipe(prompt, prompt_schedule=schedule, **settings(seeds=(video + 1,), **trims))
        torch.testing.assert_close(output.frames[video], single.frames[0], atol=1e-5, rtol=0)
        assert [each["tokens"] for each in output.decisions[video]] == [each["tokens"] for each in single.decisions[0]]


@pytest.mark.parametrize("transition", ["keep", "recache", "flush", "cut"])
def test_a_batch_that_changes_as_a_whole_equals_single_runs(transition):
    pipe, change = full_pipeline(), {"prompt_transition": transition, "blend_chunks": 1}
    schedule = {2: [THIRD, PROMPT]}
    trims = {"drift_sensitivity": 0.0, "warmup_chunks": 1}
    output = pipe([PROMPT, OTHER], prompt_schedule=schedule, **change, **settings(seeds=(1, 2), **trims))
    for video, prompt in enumerate((PROMPT, OTHER)):
        own = {2: schedule[2][video]}
        single = pipe(prompt, prompt_schedule=own, **change, **settings(seeds=(video + 1,), **trims))
        torch.testing.assert_close(output.frames[video], single.frames[0], atol=1e-5, rtol=0)


def test_guidance_keeps_its_negative_prompt():
    pipe = full_pipeline()
    guided = {"guidance_scale": 3.0, "negative_prompt": "a square"}
    change = {"prompt_schedule": {2: OTHER}, "prompt_transition": "recache"}
    output = pipe(PROMPT, **change, **settings(**guided))
    other = pipe(PROMPT, **change, **settings(**{**guided, "negative_prompt": "a circle"}))
    assert (output.frames - other.frames)[:, :, 2 * CHUNK :].abs().max() > 1e-4


class Told(TokenTrimPipeline.ContextPolicy):
    def __init__(self):
        self.times = 0

    def prompt_changed(self):
        self.times += 1

    def close(self, entered):
        return {"told": self.times}


def test_policies_are_notified_of_a_prompt_change():
    for blend_chunks, schedules, expected in (
        (0, [{2: THIRD}, {1: PROMPT, 4: THIRD}], [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2]]),
        (1, [{2: THIRD}, {4: THIRD}], [[0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 1, 2]]),  # a change in each chunk
    ):
        call = settings(6, seeds=(1, 2), method=[Told()], blend_chunks=blend_chunks)
        output = full_pipeline()([PROMPT, OTHER], prompt_schedule=schedules, **call)
        assert [[each["told"] for each in decisions] for decisions in output.decisions] == expected


def test_rolling_forcing_changes_with_the_chunks_in_flight():
    """Chunks in flight continue under the new prompt; the first chunk that has seen it is the first to differ."""
    rolling = {"rollout": "rolling_forcing", "num_inference_steps": 3, "window_size": 15}
    pipe = full_pipeline()
    expected = pipe(PROMPT, **settings(**rolling)).frames
    for transition in ("keep", "recache", "flush", "cut"):
        change = {"prompt_schedule": {2: OTHER}, "prompt_transition": transition}
        frames = pipe(PROMPT, **change, **settings(**rolling)).frames
        torch.testing.assert_close(frames[:, :, : 2 * CHUNK], expected[:, :, : 2 * CHUNK], atol=0, rtol=0)
        assert (frames - expected)[:, :, 2 * CHUNK : 3 * CHUNK].abs().max() > 1e-4


# Refused


BAD = [
    ({"prompt_schedule": {3: OTHER, 1: THIRD}}, ValueError, "prompt_schedule"),
    ({"prompt_schedule": {-1: OTHER}}, ValueError, "prompt_schedule"),
    ({"prompt_schedule": {1.5: OTHER}}, TypeError, "prompt_schedule"),
    ({"prompt_schedule": {"1": OTHER}}, TypeError, "prompt_schedule"),
    ({"prompt_schedule": {True: OTHER}}, TypeError, "prompt_schedule"),
    ({"prompt_schedule": {}}, TypeError, "prompt_schedule"),
    ({"prompt_schedule": OTHER}, TypeError, "prompt_schedule"),
    ({"prompt_schedule": [OTHER]}, TypeError, "prompt_schedule"),
    ({"prompt_schedule": [{1: OTHER}, {1: OTHER}]}, ValueError, "prompt_schedule"),
    ({"prompt_schedule": {5: OTHER}}, ValueError, "prompt_schedule.*below 5"),
    ({"prompt_schedule": {1: 3}}, TypeError, "prompt"),
    ({"prompt_schedule": {1: [OTHER, THIRD]}}, ValueError, "prompt"),
    ({"prompt_schedule": {1: [3]}}, TypeError, "prompt"),
    ({"prompt_schedule": {1: torch.zeros(TEXT_LENGTH, TEXT_DIM)}}, ValueError, "prompt"),
    ({"prompt_schedule": {1: torch.zeros(1, TEXT_LENGTH, TEXT_DIM).long()}}, TypeError, "prompt"),
    ({"prompt_schedule": {1: torch.zeros(1, TEXT_LENGTH, TEXT_DIM - 1)}}, ValueError, "prompt"),
    ({"prompt_schedule": {1: torch.full((1, TEXT_LENGTH, TEXT_DIM), torch.nan)}}, ValueError, "prompt"),
    ({"prompt_schedule": {1: OTHER}, "prompt_transition": "jump"}, ValueError, "prompt_transition"),
    ({"prompt_schedule": {1: OTHER}, "prompt_transition": 3}, TypeError, "prompt_transition"),
    ({"prompt_schedule": {1: OTHER}, "prompt_transition": {1: "jump"}}, ValueError, "prompt_transition"),
    ({"prompt_schedule": {1: OTHER}, "prompt_transition": {2: "flush"}}, ValueError, "prompt_transition"),
    ({"prompt_schedule": {1: OTHER}, "blend_chunks": -1}, ValueError, "blend_chunks"),
    ({"prompt_schedule": {1: OTHER}, "blend_chunks": "2"}, TypeError, "blend_chunks"),
    ({"prompt_schedule": {1: OTHER, 3: THIRD}, "blend_chunks": 2}, ValueError, "blend_chunks"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=str)
def test_invalid_schedules_raise_before_any_step(arguments, error, message):
    pipe = full_pipeline()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the transformer was called"))
    with pytest.raises(error, match=message):
        pipe(PROMPT, **settings(**arguments))


def test_only_keep_works_if_some_videos_do_not_change():
    pipe = full_pipeline()
    for schedule in ([{1: OTHER}, {2: THIRD}], {1: [OTHER, None]}):
        call = settings(seeds=(1, 2), prompt_schedule=schedule, prompt_transition="flush")
        with pytest.raises(ValueError, match="`prompt_transition` must be 'keep' where only some videos"):
            pipe([PROMPT, OTHER], **call)


def test_far_keeps_its_context():
    pipe = quiet(TokenTrimPipeline(**far_components()))
    arguments = {"height": 64, "width": 96, "max_sequence_length": TEXT_LENGTH, "num_inference_steps": 2}
    arguments |= {"num_frames": 25, "method": "plain", "output_type": "latent"}
    for transition in ("recache", "flush", "cut"):
        with pytest.raises(ValueError, match="`prompt_transition` must be 'keep' for AnyFlow-FAR"):
            pipe(PROMPT, prompt_schedule={2: OTHER}, prompt_transition=transition, **arguments)
    latents = torch.randn(1, CHANNELS, 7, 8, 12, generator=torch.Generator().manual_seed(0))
    videos = [pipe(PROMPT, latents=latents, prompt_schedule=each, **arguments).frames for each in (None, {2: OTHER})]
    torch.testing.assert_close(videos[1][:, :, :3], videos[0][:, :, :3], atol=0, rtol=0)
    assert (videos[1] - videos[0])[:, :, 3:].abs().max() > 1e-4
    with pipe.stream(PROMPT, **arguments) as stream, pytest.raises(ValueError, match="'keep' for AnyFlow-FAR"):
        stream.set_prompt(OTHER, "cut")
