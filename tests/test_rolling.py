"""Rolling Forcing: against the algorithm written out without a cache, and the parts that trimming must not change."""

import copy
import json
import re

import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    HEIGHT,
    NUM_TOKENS,
    WIDTH,
    case_id,
    embeds,
    full_pipeline,
    generators,
    held_tokens,
    latent_pipeline,
    noise,
    processors,
    quiet,
    randn,
    roll,
    steady_noise,
    tiny_transformer,
    triggers,
)
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from oracle import oracle_rolling

from research.evaluation.controls import SameContext
from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_views.layout import Pass


STEPS = 3
SCHEDULERS = {
    "FlowMapEuler": lambda: FlowMapEulerDiscreteScheduler(shift=5.0),
    "FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "stochastic": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
    "LCM": lambda: FlowMatchLCMScheduler(shift=5.0),
}
every_scheduler = pytest.mark.parametrize("stock", SCHEDULERS.values(), ids=SCHEDULERS)
PLAIN = {"method": "plain"}
EAGER = {"drift_sensitivity": 0.0, "prune_fraction": 0.4, "warmup_chunks": 1}
both_methods = pytest.mark.parametrize("method", [PLAIN, EAGER], ids=["plain", "eager"])


def rolling(latents, stock=SCHEDULERS["FlowMatchEuler"], pipe=None, **settings):
    pipe = latent_pipeline(scheduler=stock()) if pipe is None else pipe
    return roll(pipe, latents, **{"rollout": "rolling_forcing", "num_inference_steps": STEPS, **settings})


def sigmas_of(num_steps):
    linear = [1 - step / num_steps for step in range(num_steps)]
    return [5 * s / (1 + 4 * s) for s in linear]


def draws(sizes=(CHUNK,) * 30):
    return lambda chunk, step: randn(1, CHANNELS, sizes[chunk], HEIGHT, WIDTH, seed=100 + 10 * chunk + step)


def windows_of(latents, **settings):
    """The output, and the latents of the window after each forward."""
    windows = []

    def callback(pipe, step, timestep, tensors):
        windows.append(tensors["latents"].clone())
        return {}

    return rolling(latents, callback_on_step_end=callback, **settings), windows


# Against forwards over all of the past


def compare(num_chunks, lcm, num_steps=STEPS, sizes=None, num_given=0, method="tokentrim", **settings):
    sizes = [CHUNK] * num_chunks if sizes is None else sizes
    transformer, latents = tiny_transformer(), noise(num_chunks, seed=8)[:, :, : sum(sizes)]
    renoise = draws(sizes) if lcm else None
    negative = embeds(seed=8)
    given = noise(num_chunks, seed=4)[:, :, : sum(sizes[:num_given])]
    output = rolling(
        latents,
        pipe=latent_pipeline(transformer, SCHEDULERS["LCM" if lcm else "FlowMatchEuler"]()),
        num_inference_steps=num_steps,
        chunk_partition=sizes,
        video_latents=given.transpose(1, 2) if num_given else None,
        protect_conditioning=False,
        method=method,
        renoise=renoise,
        negative_prompt_embeds=negative,
        **settings,
    )
    expected, attempts = oracle_rolling(
        transformer,
        latents.split(sizes, dim=2),
        embeds(),
        sigmas_of(num_steps),
        renoise=renoise,
        negative_text=negative,
        given=given.split(sizes[:num_given], dim=2) if num_given else (),
        method=method,
        **settings,
    )
    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    for decision, tried in zip(output.decisions[0], attempts, strict=True):
        assert decision["trim"] == (len(tried) > 1)
        assert decision["tokens"] == sorted({token for _, tokens in tried[:-1] for token in tokens})
        assert decision["severity"] == (pytest.approx(tried[0][0], abs=1e-4) if tried else None)
        regenerated = pytest.approx(tried[-1][0], abs=1e-4) if len(tried) > 1 else None
        assert decision["regenerated_severity"] == regenerated
    return output


both_rules = pytest.mark.parametrize("lcm", [False, True], ids=["euler", "lcm"])


@both_rules
@pytest.mark.parametrize("window_size", [None, 12, 16])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 6, 9])
def test_plain_rollout_equals_placed_forwards(num_chunks, window_size, lcm):
    """From fewer chunks than steps to more than the window holds."""
    compare(num_chunks, lcm, window_size=window_size, **PLAIN)


@both_rules
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window_size": 12},
        {"window_size": 14, "warmup_chunks": 1},
        {"window_size": 18, "max_regenerations": 2, "prune_fraction": 0.3},
        {"window_size": 15, "guidance_scale": 2.5},
        {"window_size": 15, "num_sink_frames": 1},
        {"window_size": 16, "num_sink_frames": 4},
        {"window_size": 12, "num_sink_frames": 0},
        {"window_size": 15, "relative_positions": False},
        {"window_size": 12, "num_steps": 2},
        {"window_size": 21, "num_steps": 5},
        {"window_size": 8, "num_steps": 1},
        {"window_size": 15, "num_given": 1},
        {"window_size": 12, "num_given": 3},
        {"window_size": 14, "sizes": [2, 3, 1, 4, 2, 3, 1, 2, 4, 3]},
        {"window_size": 15, "num_given": 2, "sizes": [1, 3, 2, 4, 2, 3, 1, 2, 4, 3]},
    ],
    ids=str,
)
def test_trimmed_rollout_equals_placed_forwards(settings, lcm):
    output = compare(10, lcm, **{**EAGER, **settings})
    assert triggers(output.decisions[0])


def test_outlier_triggers_at_its_chunk():
    """With the paper's settings; token 0 of the grid is the corner that jumps."""
    output = rolling(steady_noise(7, [4]), window_size=15)
    assert triggers(output.decisions[0]) == [4]
    assert output.decisions[0][4]["tokens"] == [0]


def test_default_sink_is_the_first_chunk_directly_before_the_recent_frames():
    settings = {"window_size": 15, "chunk_partition": [2, 3, 3, 3, 3, 3, 3, 3, 1], **PLAIN}
    default = rolling(noise(8), **settings).frames
    assert torch.equal(rolling(noise(8), num_sink_frames=2, relative_positions=True, **settings).frames, default)
    for other in ({"num_sink_frames": 3}, {"num_sink_frames": 0}, {"relative_positions": False}):
        changed = rolling(noise(8), **settings, **other).frames
        assert (changed - default).abs().max() > 1e-3, other


def test_rolling_forcing_with_one_step_is_self_forcing():
    """A window of one chunk and one step, in both rollouts."""
    one, other = (
        rolling(noise(9, seed=8), rollout=rollout, num_inference_steps=1, num_sink_frames=3, **EAGER)
        for rollout in ("rolling_forcing", "self_forcing")
    )
    assert triggers(one.decisions[0])
    assert torch.equal(one.frames, other.frames) and one.decisions == other.decisions


# What trimming leaves alone


@every_scheduler
def test_a_gate_that_never_triggers_changes_no_bit(stock):
    shut, *others = (
        rolling(
            steady_noise(7, [3, 4]),
            stock,
            window_size=15,
            generator=torch.Generator().manual_seed(0),
            **settings,
        )
        for settings in (
            PLAIN,
            {"drift_sensitivity": 1e6},
            {"warmup_chunks": 7, "drift_sensitivity": 0.0},
            {"max_regenerations": 0, "drift_sensitivity": 0.0},
        )
    )
    for other in others:
        assert torch.equal(shut.frames, other.frames)
        assert not triggers(other.decisions[0]) and not triggers(other.decisions[1])
        for ours, theirs in zip(shut.decisions, other.decisions):
            assert [d["severity"] for d in ours] == [d["severity"] for d in theirs]


@every_scheduler
def test_trimmed_and_plain_differ_from_the_first_trigger_on(stock):
    """Not a forward earlier: the first attempt at the triggering chunk equals the plain one, with its whole window."""
    (plain, plain_windows), (trimmed, trimmed_windows) = (
        windows_of(
            noise(8, seed=8),
            stock=stock,
            window_size=15,
            generator=torch.Generator().manual_seed(0),
            **method,
        )
        for method in (PLAIN, EAGER)
    )
    first = triggers(trimmed.decisions[0])[0]
    assert 2 < first < 6
    attempt = first + STEPS - 1  # the forward in which that chunk becomes final
    for ours, theirs in zip(plain_windows[: attempt + 1], trimmed_windows):
        assert torch.equal(ours, theirs)
    again = trimmed_windows[attempt + 1]
    assert again.shape == plain_windows[attempt].shape
    for ours, theirs in zip(plain_windows[attempt].split(CHUNK, dim=2), again.split(CHUNK, dim=2)):
        assert not torch.equal(ours, theirs)  # the chunks behind it come from the second attempt too
    assert torch.equal(trimmed.frames[:, :, first * CHUNK : (first + 1) * CHUNK], again[:, :, :CHUNK])
    assert torch.equal(plain.frames[:, :, : first * CHUNK], trimmed.frames[:, :, : first * CHUNK])


@pytest.mark.parametrize("stock", [SCHEDULERS["FlowMatchEuler"], SCHEDULERS["LCM"]], ids=["Euler", "LCM"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_equals_single_runs(stock, guidance_scale):
    latents, text, negative = noise(8, 3, seed=4), embeds(3), embeds(3, seed=8)

    def run(videos):
        return rolling(
            latents[videos],
            stock,
            prompt_embeds=text[videos],
            negative_prompt_embeds=negative[videos],
            guidance_scale=guidance_scale,
            generator=generators(*videos),
            window_size=15,
            **EAGER,
        )

    batch = run([0, 1, 2])
    assert len({tuple(triggers(decisions)) for decisions in batch.decisions}) > 1
    for video in range(3):
        single = run([video])
        torch.testing.assert_close(batch.frames[[video]], single.frames, atol=1e-5, rtol=0)
        for ours, theirs in zip(batch.decisions[video], single.decisions[0], strict=True):
            assert (ours["trim"], ours["tokens"]) == (theirs["trim"], theirs["tokens"])


def test_callback_of_a_regeneration_sees_only_its_videos():
    latents, settings = steady_noise(6, [9, 3]), {"window_size": 15}
    watched, windows = windows_of(latents, **settings)
    assert [triggers(decisions) for decisions in watched.decisions] == [[], [3]]
    num_forwards = 3 + STEPS
    assert [len(window) for window in windows] == [2] * num_forwards + [1] + [2] * (6 + STEPS - 1 - num_forwards)
    plain = rolling(latents, **PLAIN, **settings).frames
    assert torch.equal(watched.frames[:1], plain[:1]) and not torch.equal(watched.frames[1:], plain[1:])


# The sink


@pytest.mark.parametrize("num_sink_frames", [3, 1, 4])
def test_sink_is_never_evicted_and_never_changes(num_sink_frames):
    """And evicted tokens stay away, although they are still inside the window."""
    pipe, seen = latent_pipeline(), []

    def on_chunk(index, latents, decisions):
        cache = copy.deepcopy(pipe.transformer.blocks[1].attn1.processor.cache)
        cache.begin_pass(CHUNK, Pass("denoise"))
        blank = torch.zeros(1, CHUNK * NUM_TOKENS, 2, 12)
        _, values, _ = cache.update(1, blank, blank)
        keys = cache.state_dict()["layers_at_home"][1][
            0
        ]  # what a pass reads of the sink is rotated from there, always
        seen.append((decisions[0], held_tokens(cache), keys, values))

    output = rolling(
        noise(14, seed=8), pipe=pipe, window_size=18, num_sink_frames=num_sink_frames, on_chunk=on_chunk, **EAGER
    )
    assert len(triggers(output.decisions[0])) > 2
    sink = [(frame, token) for frame in range(num_sink_frames) for token in range(NUM_TOKENS)]
    num_sink = len(sink)
    complete = [each for each in seen if each[1][-1][0] + 1 >= num_sink_frames]
    evicted, missed = set(), 0
    for decision, held, keys, values in seen:
        assert held[:num_sink] == sink[: len(held)]
        before = range(num_sink_frames, decision["chunk"] * CHUNK)
        evicted |= {(frame, token) for frame in before for token in decision["tokens"]}
        assert not evicted & set(held)
        missed += sum(frame >= held[-1][0] - CHUNK for frame, _ in evicted)
    assert missed  # young enough that the window alone would have kept them
    for _, _, keys, values in complete:
        for now, first in ((keys, complete[0][2]), (values, complete[0][3])):
            assert first[:, :num_sink].abs().min() > 0
            assert torch.equal(now[:, :num_sink], first[:, :num_sink])


# Random numbers


@pytest.mark.parametrize("num_chunks, num_given", [(7, 0), (2, 0), (7, 2)])
@both_methods
def test_renoise_is_called_once_per_chunk_and_step(num_chunks, num_given, method):
    """And never after the last step; a regeneration replays its results."""
    asked = []

    def renoise(chunk, step):
        asked.append((chunk, step))
        return draws()(chunk, step)

    given = noise(num_chunks, seed=5)[:, :, : num_given * CHUNK].transpose(1, 2) if num_given else None
    settings = {"video_latents": given, "window_size": 15, **method}
    output = rolling(noise(num_chunks, seed=8), SCHEDULERS["LCM"], renoise=renoise, **settings)
    assert bool(triggers(output.decisions[0])) == (method == EAGER and num_chunks == 7)
    assert sorted(asked) == [(chunk, step) for chunk in range(num_given, num_chunks) for step in range(STEPS - 1)]


@every_scheduler
@pytest.mark.parametrize("many", [False, True], ids=["one generator", "a list"])
def test_trimming_draws_no_more_random_numbers(stock, many):
    states = []
    for method in (PLAIN, EAGER):
        generator = generators(0) if many else torch.Generator().manual_seed(0)
        output = rolling(noise(8, seed=8), stock, generator=generator, **method)
        states.append((generator[0] if many else generator).get_state())
    assert triggers(output.decisions[0])
    assert torch.equal(*states)


@pytest.mark.parametrize("stock", [SCHEDULERS["LCM"], SCHEDULERS["stochastic"]], ids=["LCM", "stochastic"])
@pytest.mark.parametrize("many", [False, True], ids=["one generator", "a list"])
def test_default_draws_follow_the_seed_and_repeat_in_a_regeneration(stock, many):
    """With a policy whose tokens keep their full weight, a regeneration is the same forward again."""

    def run(seed, **method):
        generator = generators(seed, seed + 1) if many else torch.Generator().manual_seed(seed)
        return rolling(noise(8, 2, seed=8), stock, generator=generator, **method)

    first, again, other = run(0, **EAGER), run(0, **EAGER), run(2, **EAGER)
    assert torch.equal(first.frames, again.frames) and not torch.equal(first.frames, other.frames)
    plain, trimmed = run(0, **PLAIN), run(0, method=SameContext(**EAGER))
    assert set(triggers(trimmed.decisions[0])) != set(triggers(trimmed.decisions[1]))
    torch.testing.assert_close(trimmed.frames, plain.frames, atol=1e-5, rtol=0)


# Cost, progress, callbacks


@pytest.mark.parametrize(
    "num_chunks, num_given, max_regenerations", [(1, 0, 1), (2, 0, 1), (7, 0, 0), (7, 0, 1), (7, 0, 2), (7, 1, 1)]
)
def test_cost_of_a_rollout_in_forwards(num_chunks, num_given, max_regenerations, capfd):
    """One forward per window, one per regeneration, and a context pass for each chunk except the last."""
    pipe, timesteps = latent_pipeline(), []

    def count(module, args, kwargs):
        timesteps.append(kwargs["timestep"].max().item())

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    pipe.set_progress_bar_config(disable=False)
    latents = steady_noise(num_chunks, [3])
    output = rolling(
        latents,
        pipe=pipe,
        video_latents=latents[:, :, : num_given * CHUNK].transpose(1, 2) if num_given else None,
        max_regenerations=max_regenerations,
    )
    # The jump is in the noise: it stays far above the threshold, and a second attempt would evict nothing else.
    assert triggers(output.decisions[0]) == ([3] if max_regenerations and num_chunks == 7 else [])
    num_windows = num_chunks - num_given + STEPS - 1
    assert pipe.num_timesteps == num_windows
    num_forwards = num_windows + (min(max_regenerations, 1) if num_chunks == 7 else 0)
    assert len(timesteps) - timesteps.count(0) == num_forwards
    assert timesteps.count(0) == num_chunks - 1
    done, total = re.findall(r"(\d+)/(\d+)", capfd.readouterr().err)[-1]
    assert int(done) == int(total) == num_forwards


def test_callback_is_given_the_latents_of_the_window():
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append((step, timestep.item(), tensors["latents"]))
        return {}

    pipe = latent_pipeline()
    frames = rolling(noise(4), pipe=pipe, callback_on_step_end=callback).frames
    assert [step for step, _, _ in calls] == [0, 1, 2, 2, 2, 2]
    assert [timestep for _, timestep, _ in calls] == [pipe.scheduler.timesteps[step].item() for step, _, _ in calls]
    assert [latents.shape[2] // CHUNK for _, _, latents in calls] == [1, 2, 3, 3, 2, 1]
    for chunk, (_, _, latents) in zip(frames.split(CHUNK, dim=2), calls[2:], strict=True):
        assert torch.equal(latents[:, :, :CHUNK], chunk)


def test_callback_may_change_the_window():
    """If it inserts another rollout's window after two forwards, the rest equals that rollout, bit for bit."""
    latents = noise(7)
    others = torch.cat([noise(2, seed=9), latents[:, :, 2 * CHUNK :]], dim=2)
    expected, windows = windows_of(others, **EAGER)
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append(step)
        return {"latents": windows[1]} if len(calls) == 2 else {}

    changed = rolling(latents, callback_on_step_end=callback, **EAGER)
    assert torch.equal(changed.frames, expected.frames) and changed.decisions == expected.decisions
    assert not torch.equal(rolling(latents, **EAGER).frames, expected.frames)


def test_on_chunk_is_called_once_for_each_accepted_chunk():
    calls = []
    output = rolling(steady_noise(6, [3, 4]), on_chunk=lambda *arguments: calls.append(arguments))
    assert triggers(output.decisions[0]) == [3]
    assert [index for index, _, _ in calls] == list(range(6))
    for index, latents, decisions in calls:
        assert torch.equal(latents, output.frames[:, :, index * CHUNK : (index + 1) * CHUNK])
        assert decisions == [video_decisions[index] for video_decisions in output.decisions]


@pytest.mark.parametrize("at", range(1, 8))
def test_interrupt_stops_at_once(at):
    """After that many of the 7 windows: only the chunks finished before it are returned."""
    windows, forwards = [], []

    def callback(pipe, step, timestep, tensors):
        windows.append(forwards[-1])
        pipe._interrupt = len(windows) == at
        return {}

    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(len(forwards)))
    output = rolling(noise(5), pipe=pipe, callback_on_step_end=callback)
    assert len(windows) == at and forwards[-1] == windows[-1]
    num_chunks = max(at - STEPS, 0)
    assert output.frames.shape[2] == num_chunks * CHUNK and len(output.decisions[0]) == num_chunks
    assert processors(pipe.transformer) == before
    whole = rolling(noise(5)).frames
    assert torch.equal(output.frames, whole[:, :, : num_chunks * CHUNK])
    assert torch.equal(rolling(noise(5), pipe=pipe).frames, whole)


def test_interrupt_between_chunks_adds_no_chunk():
    def on_chunk(index, latents, decisions):
        pipe._interrupt = index == 1

    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    output = rolling(noise(5), pipe=pipe, on_chunk=on_chunk)
    assert len(forwards) == STEPS + 1 + 2
    assert torch.equal(output.frames, rolling(noise(5)).frames[:, :, : 2 * CHUNK])
    assert len(output.decisions[0]) == 2


# Bad input


def refuse(pipe, error, message, **arguments):
    forwards, before = [], processors(pipe.transformer)
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(error, match=message):
        rolling(noise(6), pipe=pipe, **arguments)
    assert not forwards and processors(pipe.transformer) == before


@pytest.mark.parametrize(
    "arguments, minimum",
    [
        ({}, 12),
        ({"num_sink_frames": 5}, 14),
        ({"num_sink_frames": 0}, 9),
        ({"num_inference_steps": 5}, 18),
        ({"chunk_partition": [2, 2, 2, 1, 5, 1, 5]}, 13),
        ({"num_frames_per_chunk": 2}, 8),
    ],
    ids=str,
)
def test_too_short_window_raises(arguments, minimum):
    message = f"`window_size` .* >= {minimum}: .* sink frames and .* is {minimum - 1}"
    refuse(latent_pipeline(), ValueError, message, window_size=minimum - 1, **arguments)
    rolling(noise(6), window_size=minimum, **arguments)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
        FlowMatchHeunDiscreteScheduler(),
    ],
    ids=["UniPC", "DPM++", "sde-DPM++", "Heun"],
)
def test_scheduler_with_a_history_raises(scheduler):
    refuse(latent_pipeline(scheduler=scheduler), ValueError, f"`scheduler` .*TokenTrim{type(scheduler).__name__}")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"drift_signal": "first_step"}, ValueError, "`drift_signal` .*'final'.*rolling_forcing.*'first_step'"),
        ({"rollout": "rolling"}, ValueError, "`rollout` .*'self_forcing', 'rolling_forcing'.*'rolling'"),
        ({"rollout": True}, TypeError, "`rollout` .*'rolling_forcing'.*True"),
        ({"num_sink_frames": -1}, ValueError, "`num_sink_frames` .*-1"),
        ({"num_sink_frames": 3.0}, TypeError, "`num_sink_frames` .*3.0"),
        ({"relative_positions": 1}, TypeError, "`relative_positions` .*1"),
        ({"renoise": draws()}, ValueError, "`renoise` .*does not re-noise"),
    ],
    ids=lambda value: case_id(value) if isinstance(value, dict) else "",
)
def test_bad_argument_raises(arguments, error, message):
    refuse(latent_pipeline(), error, message, **arguments)


@pytest.mark.parametrize("at, num_forwards", [((0, 0), 1), ((3, 1), 5 + 2)], ids=str)
def test_renoise_with_wrong_noise_raises(at, num_forwards):
    """It raises when the noise is drawn; the second after five windows and two context passes."""
    pipe = latent_pipeline(scheduler=FlowMatchLCMScheduler(shift=5.0))
    forwards, before = [], processors(pipe.transformer)
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=re.escape(f"renoise{at}")):
        rolling(noise(6), pipe=pipe, renoise=lambda chunk, step: noise(2 if (chunk, step) == at else 1))
    assert processors(pipe.transformer) == before
    assert len(forwards) == num_forwards


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("forward", [1, 3, 4, 10])
def test_call_after_an_error_equals_a_first_call(forward, error):
    """In a window and in a context pass (the fourth forward and, after the regeneration, the tenth)."""

    def fail(*_):
        forwards.append(1)
        if len(forwards) == forward:
            raise error

    pipe, forwards = latent_pipeline(scheduler=FlowMatchLCMScheduler(shift=5.0)), []
    before = processors(pipe.transformer)
    handle = pipe.transformer.blocks[1].register_forward_hook(fail)
    with pytest.raises(error):
        rolling(noise(6), pipe=pipe, **EAGER)
    handle.remove()
    assert processors(pipe.transformer) == before
    fresh = rolling(noise(6), SCHEDULERS["LCM"], generator=generators(0), **EAGER)
    assert torch.equal(rolling(noise(6), pipe=pipe, generator=generators(0), **EAGER).frames, fresh.frames)


# Settings of the checkpoint


def test_settings_are_saved_with_the_checkpoint(tmp_path):
    settings = {"rollout": "rolling_forcing", "window_size": 12, "num_inference_steps": STEPS}
    call = {"prompt": "a red circle", "num_frames": 93, "output_type": "latent", **EAGER}
    size = {"height": 32, "width": 48, "max_sequence_length": 8}
    full_pipeline(FlowMatchLCMScheduler(shift=5.0), **settings).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: index[name] for name in settings} == settings
    loaded = quiet(TokenTrimPipeline.from_pretrained(tmp_path))
    bare = quiet(TokenTrimPipeline(**loaded.components))  # the same weights in memory: their alignment moves last bits
    expected = bare(generator=generators(0), **call, **settings, **size)
    output = loaded(generator=generators(0), **call)
    assert torch.equal(output.frames, expected.frames) and output.decisions == expected.decisions
    assert triggers(expected.decisions[0])
    other = loaded(generator=generators(0), rollout="self_forcing", **call)
    assert not torch.equal(other.frames, expected.frames)
