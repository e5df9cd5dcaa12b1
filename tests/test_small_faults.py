"""Small faults that the other tests do not notice: each of these kills a mutation of `tests/mutations.yaml`."""

import math
import subprocess

import numpy as np
import PIL.Image
import pytest
import torch
from builders import (
    CHANNELS,
    CHUNK,
    GRID,
    HEIGHT,
    NUM_TOKENS,
    WIDTH,
    embeds,
    full_pipeline,
    generators,
    held_tokens,
    latent_pipeline,
    noise,
    randn,
    roll,
    steady_noise,
    tiny_transformer,
)
from diffusers import DPMSolverMultistepScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from imageio_ffmpeg import get_ffmpeg_exe

from tokentrim import RollingKVCache, TokenTrimFlowMatchEulerDiscreteScheduler
from tokentrim.tokentrim_backbones.attention import ExactTimesteps
from tokentrim.tokentrim_frames.mp4 import VideoWriter
from tokentrim.tokentrim_policies.matching import MatchHistogram
from tokentrim.tokentrim_policies.outliers import mean_offsets
from tokentrim.tokentrim_policies.reanchor import Reanchor
from tokentrim.tokentrim_policies.stability import summarize
from tokentrim.tokentrim_session.given import image_as_video
from tokentrim.tokentrim_session.prompts import read_schedule
from tokentrim.tokentrim_views.layout import Layout, View, WindowLayout
from tokentrim.tokentrim_views.memory import Memory
from tokentrim.tokentrim_views.registry import make_layout
from tokentrim.tokentrim_views.rope import grid_places


A, B, C, D = "a red circle", "a green square", "a blue circle", "a green circle"
BUDGET = {"deep_sink": {"window_size": 12, "num_sink_frames": 3, "budget": 9, "num_recent_frames": 4}}


# Quarantine and re-anchoring


def test_a_rejection_leaves_the_rest_of_the_context():
    held = {}

    def callback(pipe, step, timestep, tensors):
        held[stream.index] = held_tokens(stream.run.backbone.cache)
        return {}

    stream = latent_pipeline().stream(
        latents=steady_noise(9, [6]),
        prompt_embeds=embeds(),
        output_type="latent",
        num_inference_steps=1,
        method={"quarantine": {"sensitivity": 6.0}},
        callback_on_step_end=callback,
    )
    assert [chunk.index for chunk in stream if chunk.decisions[0]["quarantined"]] == [6] and held[7] == held[6]


def reanchored(levels, tolerance=0.2, patience=3):
    """What becomes of the last chunk, of one noise without a mean that is shifted by so many deviations."""
    first = randn(CHANNELS, CHUNK, HEIGHT, WIDTH)
    first = first - first.mean((1, 2, 3), keepdim=True)
    policy = Reanchor("mean", tolerance, patience)
    for level in levels:
        policy.commit(first + level * first.std((1, 2, 3), keepdim=True))
        outcome = policy.close(True)["reanchored"]
    return outcome


def test_the_mean_of_the_offsets_decides_whether_a_video_is_released():
    assert reanchored([0, 0, 0, 0.5, 0]) == "held"
    assert reanchored([0, 0.5, 0.5, 0]) == "watched"


def test_motion_to_and_fro_is_no_change():
    assert reanchored([0, 0.5, -0.5, 0.4, 0]) == "held"


def test_offsets_are_in_deviations_of_the_reference_not_of_the_chunk():
    reference = randn(CHANNELS, CHUNK, HEIGHT, WIDTH)
    mean, std = (each((1, 2, 3), keepdim=True) for each in (reference.mean, reference.std))
    torch.testing.assert_close(
        mean_offsets(3 * reference + 2 * std - 2 * mean, reference), torch.full((CHANNELS,), 2.0)
    )


def test_offsets_end_with_the_patience():
    policy = Reanchor("mean", 0.2, 3)
    for _ in range(9):
        policy.commit(randn(CHANNELS, CHUNK, HEIGHT, WIDTH))
    assert len(policy.offsets) == 3


def test_a_histogram_of_three_times_the_spread_comes_back():
    reference = randn(CHANNELS, 8, 16, 16)
    middle = reference.abs() < 1.6  # 4.8 deviations, three times as far
    matched = MatchHistogram(reference)(3 * reference)
    assert (matched - reference)[middle].abs().max() < 0.25


def test_summary_of_half_precision_is_computed_in_fp32():
    latents = (randn(1, CHANNELS, 33, HEIGHT, WIDTH) + 8).bfloat16()
    assert torch.equal(summarize(latents, (1, 2, 2)), summarize(latents.float(), (1, 2, 2)))


# Batches


def test_changes_of_prompts_with_several_videos_each_equal_single_runs():
    call = {"num_frames": 21, "num_inference_steps": 1, "output_type": "latent"}
    batch = full_pipeline()(
        [A, B], prompt_schedule={1: [C, D]}, num_videos_per_prompt=2, generator=generators(0, 1, 2, 3), **call
    ).frames
    for video, (first, second) in enumerate([(A, C), (A, C), (B, D), (B, D)]):
        single = full_pipeline()(first, prompt_schedule={1: second}, generator=generators(video), **call).frames
        torch.testing.assert_close(batch[[video]], single, atol=1e-5, rtol=0)


def test_given_frames_with_several_videos_each_equal_single_runs():
    given, latents = noise(1, 2, seed=5).transpose(1, 2), noise(3, 4, seed=3)
    call = {"output_type": "latent", "num_inference_steps": 1}
    batch = latent_pipeline()(
        latents=latents, prompt_embeds=embeds(2), num_videos_per_prompt=2, video_latents=given, **call
    ).frames
    for video, prompt in enumerate([0, 0, 1, 1]):
        rows = slice(prompt, prompt + 1)
        single = latent_pipeline()(
            latents=latents[[video]], prompt_embeds=embeds(2)[rows], video_latents=given[rows], **call
        ).frames
        torch.testing.assert_close(batch[[video]], single, atol=1e-5, rtol=0)


def test_no_blending_at_the_first_chunk():
    changes = read_schedule({0: A, 3: B}, "keep", 2, 1)
    assert [change.blend_chunks for change in changes.values()] == [0, 2]


# Positions


def test_only_the_chunk_of_a_cut_stands_apart():
    seen = set()

    class Recording(WindowLayout):
        def view(self, held, new, pass_):
            seen.add((new[0] // CHUNK, pass_.kind, pass_.is_cut))
            return super().view(held, new, pass_)

    latent_pipeline()(
        prompt_embeds=embeds(seed=7),
        latents=noise(6, seed=3),
        output_type="latent",
        method="plain",
        num_inference_steps=2,
        prompt_schedule={3: embeds(seed=8)},
        prompt_transition="cut",
        layout=Recording(),
    )
    assert {(chunk, kind) for chunk, kind, is_cut in seen if is_cut} == {(3, "denoise"), (3, "commit")}


class Gaps(Layout):
    """Every second position is empty."""

    def view(self, held, new, pass_):
        return View(held, [2 * frame for frame in held], [2 * frame for frame in new])


def test_keys_are_held_at_their_latent_frames_wherever_a_pass_puts_them():
    keys = []
    for layout in (Layout(), Gaps()):
        pipe = latent_pipeline()
        call = {"latents": noise(3), "video_latents": noise(1, seed=4).transpose(1, 2), "prompt_embeds": embeds()}
        run = pipe.begin(pipe.plan(**call, output_type="latent", layout=layout, method="plain"))
        chunks = pipe.roll_out(run)
        next(chunks)
        keys.append(run.backbone.cache.layer(0).context().key.clone())
        chunks.close()
    torch.testing.assert_close(*keys, atol=1e-5, rtol=0)


def test_an_error_in_a_commit_leaves_no_tokens_behind():
    pipe = latent_pipeline()
    run = pipe.begin(pipe.plan(latents=noise(3), prompt_embeds=embeds(), output_type="latent"))
    chunks, cache = pipe.roll_out(run), run.backbone.cache
    next(chunks)
    layer = cache.layer(0)
    with pytest.raises(ZeroDivisionError), cache.writing():
        layer.new = layer.key, layer.value
        raise ZeroDivisionError
    assert layer.new is None and not cache.is_writing


# FlowMo


def test_flowmo_guides_the_first_generated_chunk_behind_given_frames():
    given = noise(1, seed=5).transpose(1, 2)
    plain, guided = (
        roll(latent_pipeline(), noise(3, seed=3), video_latents=given, method=method).frames
        for method in ("plain", {"flowmo": {"learning_rate": 0.1}})
    )
    assert not torch.equal(plain[:, :, CHUNK : 2 * CHUNK], guided[:, :, CHUNK : 2 * CHUNK])


# Layouts with a memory


def memory_of(frames):
    key, value = randn(2, len(frames), NUM_TOKENS, 2, 12)
    held = torch.ones(len(frames), NUM_TOKENS, dtype=torch.bool)
    tag = torch.zeros(len(frames), NUM_TOKENS, 3, dtype=torch.long)
    return Memory(list(frames), held, key, value, tag, None, grid_places(GRID), (4, 4, 4))


def test_only_queries_of_recent_frames_before_the_next_chunk_are_noted():
    layout, memory, new = make_layout(BUDGET), memory_of(range(12)), [12, 13, 14]
    query = randn(CHUNK * NUM_TOKENS, 2, 12, seed=9)
    layout.before_commit(memory, new, query)
    rotated = layout.rotated_queries(memory, new, query)
    torch.testing.assert_close(memory.note, rotated[-NUM_TOKENS:].sum(dim=0))  # 4 recent frames, 3 of the chunk


def test_diversity_counts_from_where_admitted_frames_are_from():
    layout, memory, seen = make_layout({"tether": {"window_size": 12}}), memory_of(range(12)), []
    memory.tag[4, :, 0] = 3
    scores = layout.scores
    layout.scores = lambda memory, candidates, frames, query: (
        seen.append(list(frames)) or scores(memory, candidates, frames, query)
    )
    layout.before_commit(memory, [12, 13, 14], randn(CHUNK * NUM_TOKENS, 2, 12, seed=9))
    assert seen == [[3, 7, *range(5, 11)]]


@pytest.mark.parametrize("method", ["plain", {"tokentrim": {"drift_sensitivity": 0.0, "warmup_chunks": 1}}], ids=str)
def test_tags_stay_with_their_tokens_when_a_window_moves_and_tokens_leave(method):
    """TAME tags what it has aligned: all behind the sink but the newest chunk."""
    pipe = latent_pipeline()
    call = {"latents": noise(8), "prompt_embeds": embeds(), "output_type": "latent", "num_inference_steps": 2}
    run = pipe.begin(pipe.plan(**call, method=method, layout={"tame": {"window_size": 9}}))
    for chunk in pipe.roll_out(run):
        cache = run.backbone.cache
        layer, frame, held = cache.layer(0), cache.book.frame[0], cache.book.held[0]
        if chunk.index in (0, 7):  # nothing to align yet; the last one is not committed
            continue
        expected = (frame >= CHUNK) & (frame < chunk.index * CHUNK)
        assert torch.equal((layer.tag[0, :, 0] > 0)[held], expected[held]), chunk.index


def test_a_resumed_run_has_the_notes_of_its_queries(tmp_path):
    """At each chunk; a compression uses the notes of the chunk before it."""
    call = {"latents": noise(10), "prompt_embeds": embeds(), "output_type": "latent", "num_inference_steps": 1}
    call |= {"method": "plain", "layout": BUDGET}
    whole = latent_pipeline()(**call).frames
    for cut in range(4, 8):
        with latent_pipeline().stream(**call, state_dir=tmp_path / str(cut)) as stream:
            for _ in range(cut):
                next(stream)
            stream.save_state()
        with latent_pipeline().resume(tmp_path / str(cut)) as stream:
            rest = torch.cat([chunk.latents for chunk in stream], dim=2)
        assert torch.equal(rest, whole[:, :, cut * CHUNK :])


# Precision and random numbers


def test_keys_of_a_bf16_model_are_normalized_in_fp32(monkeypatch):
    dtypes, update = set(), RollingKVCache.update
    monkeypatch.setattr(
        RollingKVCache,
        "update",
        lambda cache, layer, key, value, query=None: dtypes.add(key.dtype) or update(cache, layer, key, value, query),
    )
    pipe = latent_pipeline(tiny_transformer().to(torch.bfloat16))
    roll(pipe, noise(2), prompt_embeds=embeds().bfloat16())
    assert dtypes == {torch.float32}


def test_the_sinusoid_is_exact_at_large_timesteps():
    stock = tiny_transformer().condition_embedder.timesteps_proj
    ours = ExactTimesteps(stock)(torch.tensor([937.5]))[0].double()
    half = stock.num_channels // 2
    angles = [937.5 * math.exp(-math.log(10000) * index / half) for index in range(half)]
    expected = [*map(math.cos, angles), *map(math.sin, angles)]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


def test_the_x0_prediction_is_rounded_once():
    scheduler = TokenTrimFlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_rollout_timesteps(4, "cpu")
    scheduler.begin_chunk()
    flow, sample = randn(1, CHANNELS, CHUNK, 32, 32, seed=1), 100 * randn(1, CHANNELS, CHUNK, 32, 32, seed=2)
    sigma = scheduler.sigmas[0].double()
    scheduler.seek(2)
    sigma = scheduler.sigmas[2].double()
    expected = (sample.double() - sigma * flow.double()).float()
    assert torch.equal(scheduler.predict_original_sample(flow, sample), expected)


def test_noise_does_not_depend_on_the_draws_of_a_scheduler():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    drawn = []
    random = DPMSolverMultistepScheduler(**flow, algorithm_type="sde-dpmsolver++")
    schedulers = [None, FlowMatchLCMScheduler(shift=5.0), UniPCMultistepScheduler(**flow), random]
    assert len({latent_pipeline(scheduler=each).scheduler.draws_inside for each in schedulers}) == 2
    for scheduler in schedulers:
        for generator in (generators(3)[0], generators(3)):
            pipe = latent_pipeline(scheduler=scheduler)
            call = {"prompt_embeds": embeds(), "num_frames": 21, "height": 32, "width": 48, "output_type": "latent"}
            drawn.append(pipe.begin(pipe.plan(**call, generator=generator)).noise[0])
    assert all(torch.equal(each, drawn[0]) for each in drawn)


# Frames


def test_colors_of_an_mp4_are_those_of_the_frames(tmp_path):
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50], [128, 128, 128]], np.uint8)
    for number, color in enumerate(colors):
        writer = VideoWriter(tmp_path / f"{number}.mp4", fps=8, crf=0)
        writer.write(np.broadcast_to(color, (2, 64, 64, 3)).copy())
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", str(tmp_path / f"{number}.mp4")]
        command += ["-vf", "scale=in_color_matrix=bt709:in_range=tv", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        decoded = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
        assert decoded.size == 2 * 64 * 64 * 3 and np.abs(decoded.reshape(-1, 3).astype(int) - color).max() <= 3, color


def test_an_image_is_never_beyond_the_range_of_a_video():
    class Processor:
        """Overshoots, as interpolation may."""

        def preprocess(self, image, height, width):
            return 1.01 * torch.ones(1, 3, height, width)

    video = image_as_video(PIL.Image.new("RGB", (48, 32), "white"), Processor(), 32, 48)
    assert video.max() == 1


def test_frames_that_cannot_be_converted_leave_the_decoder_where_it_was(tmp_path, monkeypatch):
    """The chunk is decoded again by the resumed run, to the same frames."""
    call = {"prompt": A, "num_frames": 33, "num_inference_steps": 1, "output_type": "np"}
    whole = full_pipeline()(**call, generator=generators(0)[0]).frames
    pipe, frames = full_pipeline(), []
    with pytest.raises(MemoryError), pipe.stream(**call, generator=generators(0)[0], state_dir=tmp_path) as stream:
        frames.append(next(stream).frames)
        monkeypatch.setattr(pipe.video_processor, "postprocess_video", broken)
        next(stream)
    with full_pipeline().resume(tmp_path) as stream:
        frames += [chunk.frames for chunk in stream]
    assert (np.concatenate(frames, axis=1) == whole).all()


def broken(*args, **kwargs):
    raise MemoryError("no memory")
