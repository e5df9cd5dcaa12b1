"""The files that `save_video` of streams and outputs writes: refused before the work, at the model's frame rate."""

import json
import multiprocessing
import os
import signal

import imageio.v3 as imageio
import pytest
import torch
from builders import CHUNK, full_pipeline

from tokentrim.tokentrim_files.run_state import load_state, lock_state
from tokentrim.tokentrim_frames.mp4 import LineWriter, VideoWriter


PROMPT = "a red circle moving right over a blue background"


def settings(num_chunks=2, **others):
    return {"num_frames": 4 * CHUNK * num_chunks - 3, "window_size": 9, "generator": torch.manual_seed(0), **others}


def stream(pipe=None, **others):
    return (pipe or full_pipeline()).stream(PROMPT, **settings(**others))


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    "name, error, message",
    [
        ("x.gif", ValueError, "`path` must end with .mp4, but is '.*x.gif'"),
        ("x", ValueError, "`path` must end with .mp4"),
        ("missing/x.mp4", OSError, "`path` must be in an existing folder, but .*missing does not exist"),
    ],
)
def test_bad_paths_raise_before_anything_runs(name, error, message, prompts, tmp_path):
    pipe = full_pipeline()
    output = pipe([PROMPT] * prompts, **settings(1))
    with pipe.stream([PROMPT] * prompts, **settings()) as running:
        for save in (running.save_video, output.save_video):
            with pytest.raises(error, match=message):
                save(tmp_path / name)
        assert running.index == 0 and not list(tmp_path.iterdir())
        assert len(running.save_video(str(tmp_path / "x.MP4"), progress=False)) == prompts  # it can still be saved


def test_decisions_of_something_else_beside_the_video_are_kept(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "mine"}\n')
    with (
        stream() as running,
        pytest.raises(ValueError, match="`path` must be a new file or the decisions of an earlier"),
    ):
        running.save_video(tmp_path / "x.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    with stream(num_chunks=1) as running:
        (path,) = running.save_video(tmp_path / "y.mp4", progress=False)
    before = path.read_bytes()
    with stream(num_chunks=1) as running:  # again: both files are ours
        running.save_video(path, progress=False)
    assert path.read_bytes() == before


def test_missing_chunks_are_reported(tmp_path):
    with stream() as running:
        next(running)
        with pytest.raises(ValueError, match="`path` must be given before the first chunk is taken, but 1 of them"):
            running.save_video(tmp_path / "x.mp4")
    assert not list(tmp_path.iterdir())


def test_frame_rate_is_the_models(tmp_path):
    pipe = full_pipeline(fps=12)
    assert pipe.fps == 12 and full_pipeline().fps == 16
    running = stream(pipe, num_chunks=1, state_dir=tmp_path / "run")
    (path,) = running.save_video(tmp_path / "stream.mp4", progress=False)
    output = pipe(PROMPT, **settings(1))
    assert output.save_video(tmp_path / "output.mp4").read_bytes() == path.read_bytes()
    assert imageio.immeta(path, plugin="FFMPEG")["fps"] == 12 and output.fps == 12
    path = output.save_video(tmp_path / "slow.mp4", fps=8)
    assert imageio.immeta(path, plugin="FFMPEG")["fps"] == 8
    pipe.save_pretrained(tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint" / "model_index.json").read_text())["fps"] == 12
    assert type(pipe).from_pretrained(tmp_path / "checkpoint").fps == 12


@pytest.mark.parametrize("fps", [0, -1, 1001, float("nan"), "12", True])
def test_invalid_frame_rates_raise(fps):
    with pytest.raises((TypeError, ValueError), match="`fps` must be"):
        full_pipeline(fps=fps)


def test_all_videos_of_a_batch_are_saved(tmp_path):
    output = full_pipeline()([PROMPT, "a blue square"], **settings(1))
    assert output.save_video(tmp_path / "x.mp4", fps=8) == [tmp_path / "x-0.mp4", tmp_path / "x-1.mp4"]
    for video in range(2):
        alone = output.save_video(tmp_path / "alone.mp4", fps=8, video=video)
        assert alone == tmp_path / "alone.mp4"
        assert alone.read_bytes() == (tmp_path / f"x-{video}.mp4").read_bytes()


def test_two_streams_do_not_grow_one_file(tmp_path):
    (tmp_path / "link.mp4").symlink_to("x.mp4")

    def on_chunk(index, latents, decisions):
        with stream(num_chunks=1) as other:
            for name in ("x.mp4", "link.mp4"):
                with pytest.raises(ValueError, match="`path` must be a file that no other stream writes"):
                    other.save_video(tmp_path / name)

    with stream(num_chunks=1, on_chunk=on_chunk) as running:
        (path,) = running.save_video(tmp_path / "x.mp4", progress=False)
    whole = path.read_bytes()
    with stream(num_chunks=1) as again:
        again.save_video(tmp_path / "x.mp4", progress=False)
    assert path.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.mp4", "x.jsonl", "x.mp4"]


# Files that a resumed run goes on with


@pytest.mark.parametrize("name", ["x.mp4", "x.jsonl"])
def test_a_file_of_other_bytes_is_not_cut_back(name, tmp_path):
    """Such as a user's own, where the folder of a run came from elsewhere: longer than what the state knows."""
    on_chunk = iter(range(3))
    arguments = {"state_dir": tmp_path / "run", "save_every": 1, "on_chunk": lambda *_: 1 / (2 - next(on_chunk))}
    with pytest.raises(ZeroDivisionError):
        stream(num_chunks=3, **arguments).save_video(tmp_path / "x.mp4", progress=False)
    known = dict(load_state(tmp_path / "run")["files"])
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[known[str(path)]["bytes"] // 2] ^= 1
    path.write_bytes(content)
    with full_pipeline().resume(tmp_path / "run", on_chunk=lambda *_: None) as resumed:
        with pytest.raises(ValueError, match=f"{name} is not the file whose state was taken"):
            resumed.save_video(tmp_path / "x.mp4", progress=False)
    assert path.read_bytes() == content


def test_older_states_have_no_digest(tmp_path):
    log = LineWriter(tmp_path / "x.jsonl")
    log.write("{}")
    state = {"bytes": log.state["bytes"]}
    resumed = LineWriter.resume(tmp_path / "x.jsonl", state)
    assert resumed.state == state
    resumed.write("{}")
    log.write("{}")
    assert resumed.state["sha256"] == log.state["sha256"]
    video = VideoWriter(tmp_path / "x.mp4")
    assert (
        VideoWriter.resume(tmp_path / "x.mp4", {**video.state, "sha256": video.state["sha256"]}).state == video.state
    )


# Stopping, and locks


def test_finished_stream_ends_after_its_chunk_and_is_saved(tmp_path):
    running = stream(num_chunks=4, state_dir=tmp_path / "run", save_every=10)
    chunks = []
    for chunk in running:
        chunks.append(chunk)
        if chunk.index == 1:
            running.finish()
    assert len(chunks) == 2 and running.cut_short and load_state(tmp_path / "run")["run"]["index"] == 2
    with full_pipeline().resume(tmp_path / "run") as resumed:
        chunks += list(resumed)
    whole = full_pipeline()(PROMPT, **settings(4, output_type="latent")).frames
    assert torch.cat([chunk.latents for chunk in chunks], dim=2).equal(whole)
    running = stream(num_chunks=1)
    running.finish()
    assert not list(running) and running.cut_short


def hold(folder, ready):
    with lock_state(folder):
        ready.set()
        signal.pause()


def test_one_process_for_a_state_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "link").symlink_to("run")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(folder, ready))
    other.start()
    assert ready.wait(60)
    for path in (folder, tmp_path / "link"):
        with pytest.raises(
            ValueError, match="`state_dir` must be a folder that no other process uses, but .*run is in use"
        ):
            stream(state_dir=path)
        with pytest.raises(ValueError, match="is in use"):
            full_pipeline().resume(path)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with stream(state_dir=folder, save_every=1) as running:
        next(running)
        next(running)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run"]  # the lock is gone
    with full_pipeline().resume(folder) as resumed:
        assert len(list(resumed)) == 1
