"""A run that is cut after any chunk, saved, and loaded by a fresh pipeline continues to the same bits."""

import pytest
import torch
from builders import (
    CHUNK,
    embeds,
    full_pipeline,
    generators,
    latent_pipeline,
    noise,
    processors,
    steady_noise,
    triggers,
)
from contract import EAGER, METHODS, ROLLOUTS, runs
from diffusers import DPMSolverMultistepScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SCHEDULERS = {
    "LCM": lambda: FlowMatchLCMScheduler(shift=5.0),
    "sde-DPM++": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
}
GENERATORS = {
    "default": lambda: torch.manual_seed(0) and None,
    "one": lambda: torch.Generator().manual_seed(0),
    "a list": lambda: generators(0, 1),
}


def start(make_pipe, make_call):
    """A pipeline and its run, before the first chunk."""
    pipe = make_pipe()
    return pipe, pipe.begin(pipe.plan(**make_call()))


def finish(pipe, run):
    """Latents and decisions of the remaining chunks."""
    chunks = list(pipe.roll_out(run))
    return [chunk.latents for chunk in chunks], [chunk.decisions for chunk in chunks]


def check_cuts(make_pipe, make_call, cuts, folder):
    """The chunks after `cuts`, saved and loaded, equal the whole call, whose output it returns."""
    whole = make_pipe()(**make_call())
    pipe, run = start(make_pipe, make_call)
    chunks, finished = pipe.roll_out(run), []
    for num_chunks in range(max(cuts) + 1):
        if num_chunks in cuts:
            torch.save(run.state_dict(), folder / f"{num_chunks}.pt")
        finished += [chunk for chunk in [next(chunks, None)] if chunk is not None]
    chunks.close()
    for cut in cuts:
        pipe, run = start(make_pipe, make_call)
        run.load_state_dict(torch.load(folder / f"{cut}.pt", weights_only=True))
        assert run.index == cut
        latents, decisions = finish(pipe, run)
        latents = [*(chunk.latents for chunk in finished[:cut]), *latents]
        decisions = [*(chunk.decisions for chunk in finished[:cut]), *decisions]
        assert torch.equal(torch.cat(latents, dim=2), whole.frames)
        assert [list(video_decisions) for video_decisions in zip(*decisions, strict=True)] == whole.decisions
    return whole


def make_calls(latents, **settings):
    """A function that makes fresh arguments of a call, because generators advance; settings may be functions."""
    return lambda: {
        "latents": latents,
        "prompt_embeds": embeds(1 if latents is None else len(latents)),
        "num_inference_steps": 2,
        "output_type": "latent",
        **{name: value() if callable(value) else value for name, value in settings.items()},
    }


# Methods and rollouts


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_run_cut_after_any_chunk_resumes_to_the_same_bits(method, rollout, tmp_path):
    if not runs(method, rollout):
        pytest.skip("refused: the rollout cannot do the method")
    make_pipe, settings = ROLLOUTS[rollout]
    make_call = make_calls(steady_noise(8, [5], seed=8), **METHODS[method], **settings)
    whole = check_cuts(make_pipe, make_call, range(9), tmp_path)
    (decisions,), named = whole.decisions, str(METHODS[method])
    assert bool(triggers(decisions)) == ("drift_sensitivity" in named)
    assert any(decision["quarantined"] for decision in decisions) == ("quarantine" in named)
    assert any(decision["reanchored"] == "held" for decision in decisions) == ("reanchor" in named)
    assert any(decision["reanchored"] == "watched" for decision in decisions) == ("tolerance" in named)


# Batches, random numbers and conditions


@pytest.mark.parametrize("method", ["tokentrim", "reanchor with tolerance"])
@pytest.mark.parametrize("source", GENERATORS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_random_numbers_resume(scheduler, source, method, tmp_path):
    """In a guided batch of two whose videos are trimmed and rejected at different chunks."""
    make_call = make_calls(
        steady_noise(8, [4, 6], seed=8),
        num_inference_steps=3,
        generator=GENERATORS[source],
        guidance_scale=2.0,
        negative_prompt_embeds=embeds(2, seed=8),
        **METHODS[method],
    )
    with torch.random.fork_rng():
        whole = check_cuts(lambda: latent_pipeline(scheduler=SCHEDULERS[scheduler]()), make_call, [0, 3, 6], tmp_path)
    assert whole.decisions[0] != whole.decisions[1]


def test_drawn_initial_noise_is_saved(tmp_path):
    """The fresh pipeline draws other noise, and receives that of the run."""
    seeds = iter(range(100))
    make_call = make_calls(
        None,
        num_frames=93,
        height=32,
        width=48,
        prompt_embeds=embeds(),
        generator=lambda: torch.Generator().manual_seed(next(seeds)),
    )
    pipe, run = start(latent_pipeline, make_call)
    chunks = pipe.roll_out(run)
    next(chunks)
    torch.save(run.state_dict(), tmp_path / "run.pt")
    expected = [chunk.latents for chunk in chunks]
    pipe, run = start(latent_pipeline, make_call)
    run.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(finish(pipe, run)[0], expected, strict=True))


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_run_cut_among_given_frames_resumes(rollout, tmp_path):
    make_pipe, settings = ROLLOUTS[rollout]
    given = noise(2, seed=4).transpose(1, 2)
    make_call = make_calls(steady_noise(8, [5], seed=8), video_latents=given, **EAGER, **settings)
    whole = check_cuts(make_pipe, make_call, [1, 2, 5], tmp_path)
    assert torch.equal(whole.frames[:, :, : 2 * CHUNK], given.transpose(1, 2)) and triggers(whole.decisions[0])


def test_changes_of_a_callback_are_saved(tmp_path):
    """Prompt and guidance, in each step."""

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale += 0.1
        return {"prompt_embeds": 1.01 * tensors["prompt_embeds"]}

    make_call = make_calls(
        noise(5),
        guidance_scale=2.0,
        negative_prompt_embeds=embeds(seed=8),
        callback_on_step_end=lambda: callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    check_cuts(latent_pipeline, make_call, [1, 3], tmp_path)


# The state


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("method", ["tokentrim", "reanchor with tolerance"])
def test_run_returns_to_its_saved_state(method, rollout):
    """Continuing does not change a saved state, and loading it removes all later changes."""
    make_pipe, settings = ROLLOUTS[rollout]
    pipe, run = start(make_pipe, make_calls(steady_noise(9, [5], seed=8), **METHODS[method], **settings))
    chunks = pipe.roll_out(run)
    for _ in range(3):
        next(chunks)
    state = run.state_dict()
    expected = [(chunk.latents, chunk.decisions) for chunk in chunks]
    for _ in range(2):
        run.load_state_dict(state)
        for latents, other, decisions, chunk_decisions in zip(*finish(pipe, run), *zip(*expected), strict=True):
            assert torch.equal(latents, decisions) and other == chunk_decisions


def test_state_holds_no_noise_of_finished_chunks(tmp_path):
    pipe, run = start(latent_pipeline, make_calls(noise(200), window_size=6, method="plain"))
    sizes = []
    for _ in zip(range(3), pipe.roll_out(run)):
        torch.save(run.state_dict()["noise"], tmp_path / "noise.pt")
        sizes.append((tmp_path / "noise.pt").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    "latents, settings",
    [
        (noise(6), {}),
        (noise(4), {}),
        (noise(5, 2), {}),
        (noise(5), {"generator": lambda: generators(0), "chunk_partition": [3, 3, 3, 4, 2]}),
        (noise(5), {"method": "plain"}),
        (noise(5), {"method": "tokentrim_plus"}),
    ],
    ids=["longer", "shorter", "batch", "partition", "plain", "other policies"],
)
def test_state_of_another_call_raises(latents, settings):
    pipe, run = start(latent_pipeline, make_calls(noise(5)))
    next(pipe.roll_out(run))
    _, other = start(latent_pipeline, make_calls(latents, **settings))
    with pytest.raises(ValueError, match="`state` must be of a run of the same"):
        other.load_state_dict(run.state_dict())
    assert other.index == 0


# The generator of chunks


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("end", ["closed", "dropped", "an error outside", "exhausted"])
def test_processors_are_restored_when_the_generator_ends(end, rollout):
    make_pipe, settings = ROLLOUTS[rollout]
    make_call = make_calls(noise(5), **settings)
    pipe, run = start(make_pipe, make_call)
    before = processors(pipe.transformer)
    chunks = pipe.roll_out(run)
    assert processors(pipe.transformer) == before  # until the first chunk is asked for
    next(chunks)
    assert not set(before) & set(processors(pipe.transformer))
    if end == "closed":
        chunks.close()
    elif end == "dropped":
        del chunks
    elif end == "exhausted":
        assert len(list(chunks)) == 4
    else:
        with pytest.raises(ZeroDivisionError):
            chunks.throw(ZeroDivisionError)
    assert processors(pipe.transformer) == before
    assert torch.equal(pipe(**make_call()).frames, make_pipe()(**make_call()).frames)


def test_run_continues_after_its_generator_was_closed():
    make_call = make_calls(noise(5))
    pipe, run = start(latent_pipeline, make_call)
    latents = []
    while run.index < 5:
        chunks = pipe.roll_out(run)
        latents.append(next(chunks).latents)
        chunks.close()
    assert torch.equal(torch.cat(latents, dim=2), latent_pipeline()(**make_call()).frames)


# The plan


def test_plan_equals_that_of_the_call():
    pipe = latent_pipeline(window_size=9)
    plan = pipe.plan(**make_calls(noise(5), drift_sensitivity=1.0)())
    assert plan.sizes.frame_shape == (*noise(5).shape[:2], *noise(5).shape[3:]) and plan.layout.window_size == 9
    assert plan.sizes.chunk_partition == [CHUNK] * 5 and not plan.sizes.is_endless
    assert plan.method.policies[-1].drift_sensitivity == 1.0
    assert full_pipeline().plan("a red circle", num_frames=21).inputs.prompts.prompt == "a red circle"
    with pytest.raises(ValueError, match="`prune_fraction`"):
        pipe.plan(**make_calls(noise(5), prune_fraction=2.0)())
    with pytest.raises(TypeError, match="token_trim"):
        pipe.plan(**make_calls(noise(5), token_trim=False)())
