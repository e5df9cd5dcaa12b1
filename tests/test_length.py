"""A video of any length: the pipeline generates whole chunks and cuts off frames beyond the last one."""

import json

import pytest
import torch
from builders import far_pipeline, full_pipeline, generators, latent_pipeline, randn
from imageio_ffmpeg import count_frames_and_secs


FRAMES = {"height": 32, "width": 48}  # chunks of 3 latent frames: 9, 21, 33 frames
ROLLING = {"rollout": "rolling_forcing", "num_inference_steps": 2}


def generate(num_frames, pipe=None, **arguments):
    arguments = {"prompt": "a red circle", "generator": generators(0), **FRAMES, **arguments}
    return (full_pipeline() if pipe is None else pipe)(num_frames=num_frames, **arguments)


LENGTHS = [(1, 1, 9, [1]), (20, 6, 21, [9, 11]), (22, 7, 33, [9, 12, 1])]


@pytest.mark.parametrize("num_frames, num_latent_frames, whole, chunk_frames", LENGTHS)
@pytest.mark.parametrize("settings", [{}, ROLLING], ids=["self_forcing", "rolling_forcing"])
def test_any_length_is_a_prefix_of_whole_chunks(num_frames, num_latent_frames, whole, chunk_frames, settings):
    output, long = (generate(length, output_type="pt", **settings) for length in (num_frames, whole))
    assert torch.equal(output.frames, long.frames[:, :num_frames])
    assert output.chunk_frames == chunk_frames and output.decisions == long.decisions
    output, long = (generate(length, output_type="latent", **settings) for length in (num_frames, whole))
    assert torch.equal(output.frames, long.frames[:, :, :num_latent_frames])


def test_tiled_vae_output_is_cut_too():
    pipe = full_pipeline()
    pipe.vae.enable_tiling()
    assert generate(20, pipe, output_type="np").frames.shape[1] == 20


def test_last_far_chunk_is_the_remainder():
    pipe = far_pipeline()
    sizes = pipe.plan(prompt_embeds=randn(1, 8, 32), num_frames=22, height=64, width=96, output_type="latent").sizes
    assert sizes.chunk_partition == [1, 2, 2, 2] and [sizes.chunk_frames(index) for index in range(4)] == [1, 8, 8, 5]


def test_streams_files_and_resumed_runs_have_one_length(tmp_path):
    whole = generate(20, output_type="np").frames
    arguments = {"prompt": "a red circle", "generator": generators(0), "num_frames": 20, **FRAMES}
    seen = []
    arguments["on_chunk"] = lambda index, latents, decisions: seen.append(latents.shape[2])
    with full_pipeline().stream(**arguments, state_dir=tmp_path / "state", save_every=1) as stream:
        next(stream)
        stream.save_state()
    resumed = full_pipeline().resume(tmp_path / "state", on_chunk=arguments["on_chunk"])
    with resumed:
        (chunk,) = resumed
    assert seen == [3, 3] and chunk.frames.shape[1] == 11 and (chunk.frames == whole[:, 9:]).all()
    with full_pipeline().stream(**arguments) as stream:
        (path,) = stream.save_video(tmp_path / "video.mp4", progress=False)
    assert count_frames_and_secs(str(path))[0] == 20
    assert len([json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]) == 2


@pytest.mark.parametrize("num_given, partition", [(1, [1, 3, 3]), (5, [2, 3, 3]), (13, [1, 3, 3]), (9, [3, 3, 3])])
def test_given_frames_determine_the_partition(num_given, partition):
    video = {"video": randn(1, num_given, 3, 32, 48).sigmoid(), "output_type": "latent"}
    sizes = full_pipeline().plan("a red circle", num_frames=25, **video, **FRAMES).sizes
    assert sizes.chunk_partition == partition and sum(partition[: sizes.num_given_chunks]) == (num_given - 1) // 4 + 1
    output = generate(25, **video)
    assert output.frames.shape[2] == 7
    named = generate(4 * sum(partition) - 3, chunk_partition=partition, **video).frames
    assert torch.equal(output.frames, named[:, :, :7])


def test_endless_video_continues_given_frames():
    pipe, latents = latent_pipeline(num_inference_steps=1), {"video_latents": randn(1, 4, 4, 4, 6)}
    call = {"prompt_embeds": randn(1, 8, 32), "num_frames": None, "output_type": "latent", **latents, **FRAMES}
    with pipe.stream(**call) as stream:
        assert [next(stream).latents.shape[2] for _ in range(4)] == [1, 3, 3, 3]
    assert stream.first_chunk == 0


def test_given_frames_that_fill_the_video_raise():
    with pytest.raises(ValueError, match="`video_latents`.*leave one to generate"):
        generate(9, video_latents=randn(1, 3, 4, 4, 6))
