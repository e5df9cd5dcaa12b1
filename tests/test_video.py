"""A growing mp4: its frames, and its bytes after any interruption."""

import json
import os
import resource
import signal
import subprocess
import time
import traceback
from contextlib import contextmanager
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pytest

from tokentrim.tokentrim_frames import mp4
from tokentrim.tokentrim_frames.mp4 import VideoWriter, frame_rate
from tokentrim.tokentrim_writing import numbered


FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
HEIGHT, WIDTH = 32, 48
CHUNKS = [9, 12, 12, 12, 1, 12]


def frames_of(chunk, num_frames=12, height=HEIGHT, width=WIDTH):
    """A gray step on a changing color, moving down; each frame is brighter."""
    rng = np.random.default_rng(chunk)
    frames = np.empty((num_frames, height, width, 3))
    frames[:] = rng.uniform(40, 160, 3)
    for index, frame in enumerate(frames):
        frame[index : index + height // 4] = 128
        frame += 5 * index
    return frames.clip(0, 255).astype(np.uint8)


def write_all(path, chunks=CHUNKS, first=0, writer=None, **settings):
    writer = VideoWriter(path, **settings) if writer is None else writer
    states = [writer.state]
    for index in range(first, len(chunks)):
        writer.write(frames_of(index, chunks[index]))
        states.append(writer.state)
    return states


def written(chunks=CHUNKS):
    return np.concatenate([frames_of(index, num_frames) for index, num_frames in enumerate(chunks)])


def run_ffmpeg(path, *output):
    command = [FFMPEG, "-hide_banner", "-loglevel", "error", "-i", str(path), "-fps_mode", "passthrough", *output, "-"]
    return subprocess.run(command, capture_output=True)


def played(path, height=HEIGHT, width=WIDTH):
    done = run_ffmpeg(path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-sws_flags", "accurate_rnd+full_chroma_int")
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def timestamps(path):
    """Seconds of each frame in the file."""
    lines = run_ffmpeg(path, "-enc_time_base", "demux", "-f", "framecrc").stdout.decode().splitlines()
    (base,) = (Fraction(line.split()[-1]) for line in lines if line.startswith("#tb"))
    return [int(line.split(",")[2]) * base for line in lines if not line.startswith("#")]


# What the file plays


def test_all_frames_play_in_order_and_look_like_the_input(tmp_path):
    write_all(tmp_path / "x.mp4")
    assert run_ffmpeg(tmp_path / "x.mp4", "-f", "null").stderr == b""
    shown, given = played(tmp_path / "x.mp4").astype(int), written()
    assert shown.shape == given.shape
    assert [np.abs(given - frame).mean(axis=(1, 2, 3)).argmin() for frame in shown] == list(range(58))
    flat = np.abs(shown - given)[:, -8:]  # the edges of the step are coarser: colours have half the resolution
    assert flat.mean(axis=(1, 2, 3)).max() < 3  # of 255
    count, seconds = imageio_ffmpeg.count_frames_and_secs(tmp_path / "x.mp4")
    assert (count, seconds) == (58, pytest.approx(58 / 16, abs=0.01))


@pytest.mark.parametrize("fps", [16, 12.5, 24000 / 1001, 29.97])
def test_frames_are_evenly_spaced_across_chunks(tmp_path, fps):
    write_all(tmp_path / "x.mp4", fps=fps)
    assert timestamps(tmp_path / "x.mp4") == [index / frame_rate(fps) for index in range(58)]
    assert float(frame_rate(fps)) == pytest.approx(fps, rel=1e-6)


def test_every_chunk_begins_with_a_keyframe_and_holds_no_other(tmp_path):
    write_all(tmp_path / "x.mp4", chunks=[9, 200, 12])
    command = [FFMPEG, "-loglevel", "error", "-skip_frame", "nokey", "-i", str(tmp_path / "x.mp4")]
    done = subprocess.run([*command, "-fps_mode", "passthrough", "-f", "framecrc", "-"], capture_output=True)
    frames = [line for line in done.stdout.decode().splitlines() if not line.startswith("#")]
    assert [int(line.split(",")[2]) for line in frames] == [0, 9, 209]


@pytest.mark.parametrize("height, width", [(33, 48), (32, 47), (31, 45), (1, 1), (480, 832)])
def test_odd_sizes_get_a_copy_of_the_last_row_or_column(tmp_path, height, width):
    frames = frames_of(0, 3, height, width)
    VideoWriter(tmp_path / "x.mp4").write(frames)
    shown = played(tmp_path / "x.mp4", height + height % 2, width + width % 2)
    assert len(shown) == 3
    assert np.abs(shown[:, :height, :width].astype(int) - frames).mean() < 5
    if height % 2:
        assert np.abs(shown[:, -1].astype(int) - shown[:, -2]).mean() < 4


def test_crf_sets_the_quality(tmp_path):
    fine, coarse = (write_all(tmp_path / f"{crf}.mp4", crf=crf)[-1]["bytes"] for crf in (4, 40))
    assert fine > 1.3 * coarse


def test_state_describes_the_file(tmp_path):
    states = write_all(tmp_path / "x.mp4")
    assert [state["frames"] for state in states] == [0, 9, 21, 33, 45, 46, 58]
    assert [state["chunks"] for state in states] == list(range(7))
    assert states[-1]["bytes"] == os.path.getsize(tmp_path / "x.mp4")
    assert json.loads(json.dumps(states[-1])) == states[-1]


def test_every_prefix_of_whole_chunks_plays(tmp_path):
    states = write_all(tmp_path / "x.mp4")
    whole, data = played(tmp_path / "x.mp4"), (tmp_path / "x.mp4").read_bytes()
    for state in states[1:]:
        (tmp_path / "prefix.mp4").write_bytes(data[: state["bytes"]])
        assert np.array_equal(played(tmp_path / "prefix.mp4"), whole[: state["frames"]])


# Interruptions


@contextmanager
def child(task):
    """A process that runs `task(report)`; reports are JSON lines. It forks, because imports take seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            task(lambda value: os.write(write, json.dumps(value).encode() + b"\n"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as reports:
        try:
            yield pid, reports
        finally:
            os.waitpid(pid, 0)


MOMENTS = ("encoding", "truncating", "half written", "written", "synced")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment):
    """In a child: the next chunk is its last. It counts steps, so that the machine's speed has no effect."""
    if moment == "encoding":
        mp4.encode_chunk = die
    elif moment == "written":
        mp4.os.fsync = die
    else:

        def append(path, size, added):
            with open(path, "r+b", buffering=0) as file:
                file.truncate(size)
                file.seek(size)
                file.write({"truncating": b"", "half written": added[: len(added) // 2], "synced": added}[moment])
            die()

        mp4.append = append


def test_file_killed_at_any_moment_plays_and_resumes_to_the_same_bytes(tmp_path):
    chunks = [9] + [12] * 2 * len(MOMENTS)
    write_all(tmp_path / "whole.mp4", chunks)
    whole, path = played(tmp_path / "whole.mp4"), tmp_path / "x.mp4"
    state, done = VideoWriter(path).state, []
    for moment in (*MOMENTS, *MOMENTS, None):

        def task(report):
            writer = VideoWriter.resume(path, state)
            for index in range(state["chunks"], len(chunks)):
                if moment and index > state["chunks"]:
                    die_at(moment)
                writer.write(frames_of(index, chunks[index]))
                report(writer.state)

        with child(task) as (_, reports):
            state = [json.loads(line) for line in reports][-1]
        done.append(state["chunks"])
        shown = played(path)
        assert len(shown) >= state["frames"]
        assert np.array_equal(shown[: state["frames"]], whole[: state["frames"]])
    assert done == [*range(1, 2 * len(MOMENTS) + 1), len(chunks)]  # each was killed in its second chunk, but the last
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_file_killed_within_an_append_plays_and_resumes_to_the_same_bytes(tmp_path):
    states = write_all(tmp_path / "whole.mp4")
    data = (tmp_path / "whole.mp4").read_bytes()
    start, end = states[3]["bytes"], states[4]["bytes"]
    for cut in (start + 1, start + 60, (start + end) // 2, end - 1):
        (tmp_path / "x.mp4").write_bytes(data[:cut])
        assert len(played(tmp_path / "x.mp4")) >= states[3]["frames"]
        write_all(tmp_path / "x.mp4", first=3, writer=VideoWriter.resume(tmp_path / "x.mp4", states[3]))
        assert (tmp_path / "x.mp4").read_bytes() == data


@pytest.mark.parametrize("chunks", range(len(CHUNKS) + 1))
def test_file_ahead_of_its_state_is_cut_back(tmp_path, chunks):
    states = write_all(tmp_path / "x.mp4", fps=12.5, crf=20)
    data = (tmp_path / "x.mp4").read_bytes()
    writer = VideoWriter.resume(tmp_path / "x.mp4", json.loads(json.dumps(states[chunks])))
    assert (tmp_path / "x.mp4").read_bytes() == data[: states[chunks]["bytes"]]
    assert write_all(tmp_path / "x.mp4", first=chunks, writer=writer)[-1] == states[-1]
    assert (tmp_path / "x.mp4").read_bytes() == data


def test_equal_frames_give_equal_bytes(tmp_path):
    for name in "ab":
        write_all(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Bad input


def test_file_shorter_than_its_state_raises_and_is_untouched(tmp_path):
    state = write_all(tmp_path / "x.mp4")[-1]
    os.truncate(tmp_path / "x.mp4", 1000)
    with pytest.raises(ValueError, match=f"holds 1000 bytes, but held {state['bytes']}"):
        VideoWriter.resume(tmp_path / "x.mp4", state)
    assert os.path.getsize(tmp_path / "x.mp4") == 1000


def test_other_file_raises_and_is_untouched(tmp_path):
    state = write_all(tmp_path / "x.mp4")[2]
    for data in (b"\0" * 10**5, b"text" * 10**5):
        (tmp_path / "other.mp4").write_bytes(data)
        with pytest.raises(ValueError, match="does not begin with 2 chunks"):
            VideoWriter.resume(tmp_path / "other.mp4", state)
        assert (tmp_path / "other.mp4").read_bytes() == data
    write_all(tmp_path / "other.mp4", chunks=[40, 40])
    with pytest.raises(ValueError, match="does not begin with 2 chunks"):
        VideoWriter.resume(tmp_path / "other.mp4", state)
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        VideoWriter.resume(tmp_path / "gone.mp4", state)


def test_frames_of_another_size_raise(tmp_path):
    writer = VideoWriter(tmp_path / "x.mp4")
    writer.write(frames_of(0))
    with pytest.raises(ValueError, match="of the size"):
        writer.write(frames_of(0, width=64))
    resumed = VideoWriter.resume(tmp_path / "x.mp4", writer.state)
    with pytest.raises(OSError, match="does not fit the beginning of"):
        resumed.write(frames_of(0, width=64))
    assert (tmp_path / "x.mp4").stat().st_size == writer.state["bytes"]


@pytest.mark.parametrize(
    "frames, error",
    [
        (frames_of(0) / 255, ValueError),
        (frames_of(0)[0], ValueError),
        (frames_of(0)[:0], ValueError),
        (frames_of(0)[..., :1], ValueError),
        ([1], TypeError),
    ],
    ids=["float", "picture", "empty", "grey", "list"],
)
def test_frames_that_are_not_a_video_raise(tmp_path, frames, error):
    with pytest.raises(error, match="`frames` must be"):
        VideoWriter(tmp_path / "x.mp4").write(frames)


@pytest.mark.parametrize("settings", [{"fps": 0}, {"fps": float("nan")}, {"fps": "16"}, {"crf": 52}, {"crf": None}])
def test_invalid_settings_raise(tmp_path, settings):
    with pytest.raises((TypeError, ValueError), match=f"`{[*settings][0]}` must be"):
        VideoWriter(tmp_path / "x.mp4", **settings)


def test_missing_folder_raises_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        VideoWriter(tmp_path / "missing" / "x.mp4")


def test_failing_ffmpeg_raises_and_the_file_stays_whole(tmp_path):
    writer = VideoWriter(tmp_path / "x.mp4")
    writer.write(frames_of(0))
    state, data = writer.state, (tmp_path / "x.mp4").read_bytes()
    script = tmp_path / "ffmpeg"
    for body, message in [
        ("cat > /dev/null; echo noise >&2; echo 'No such codec' >&2; exit 8", r"12 frames of 48 x 32.*8\): No such"),
        ("exit 3", "no message"),  # without reading its input
        ("cat > /dev/null; kill -9 $$", "exit status -9"),
        ("cat > /dev/null", "exit status 0"),
        (f'head -c {3 * HEIGHT * WIDTH * 5} | {FFMPEG} "$@"', "5 frames instead of 12"),
    ]:
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        writer.ffmpeg = str(script)
        with pytest.raises(OSError, match=message):
            writer.write(frames_of(1))
        assert writer.state == state and (tmp_path / "x.mp4").read_bytes() == data
    writer.ffmpeg = FFMPEG
    writer.write(frames_of(1))
    assert len(played(tmp_path / "x.mp4")) == 24


@pytest.mark.parametrize("room", [0, 1, 600])
def test_full_disk_raises_and_the_file_ends_with_a_whole_chunk(tmp_path, room):
    states = write_all(tmp_path / "x.mp4")
    data = (tmp_path / "x.mp4").read_bytes()
    assert states[3]["bytes"] - states[2]["bytes"] > 600

    def task(report):
        resource.setrlimit(resource.RLIMIT_FSIZE, (states[2]["bytes"] + room, resource.RLIM_INFINITY))
        writer = VideoWriter.resume(tmp_path / "x.mp4", states[2])
        try:
            writer.write(frames_of(2, CHUNKS[2]))
        except OSError as error:
            report([str(error), writer.state])

    with child(task) as (_, reports):
        message, state = json.loads(reports.readline())
    assert "could not be written, the file ends with the chunk before: File too large" in message
    assert str(tmp_path / "x.mp4") in message
    assert state == states[2]
    assert (tmp_path / "x.mp4").read_bytes() == data[: state["bytes"]]
    write_all(tmp_path / "x.mp4", first=2, writer=VideoWriter.resume(tmp_path / "x.mp4", state))  # room again
    assert (tmp_path / "x.mp4").read_bytes() == data


def test_file_cut_or_lost_while_it_grows_raises(tmp_path):
    writer = VideoWriter(tmp_path / "x.mp4")
    writer.write(frames_of(0))
    os.truncate(tmp_path / "x.mp4", 100)
    with pytest.raises(OSError, match="holds 100 now: something else cut it"):
        writer.write(frames_of(1))
    assert os.path.getsize(tmp_path / "x.mp4") == 100
    os.remove(tmp_path / "x.mp4")
    with pytest.raises(FileNotFoundError, match="x.mp4"):
        writer.write(frames_of(1))


def test_ctrl_c_during_an_append_leaves_the_chunk_before(tmp_path, monkeypatch):
    writer = VideoWriter(tmp_path / "x.mp4")
    writer.write(frames_of(0))
    state, data = writer.state, (tmp_path / "x.mp4").read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mp4.os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.write(frames_of(1))
    assert writer.state == state and (tmp_path / "x.mp4").read_bytes() == data


def test_ctrl_c_does_not_reach_ffmpeg(tmp_path):
    script = tmp_path / "ffmpeg"
    script.write_text(f'#!/bin/sh\ntouch {tmp_path}/runs\nsleep 0.3\nexec {FFMPEG} "$@"\n')
    script.chmod(0o755)

    def task(report):
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, lambda *_: None)
        writer = VideoWriter(tmp_path / "x.mp4")
        writer.ffmpeg = str(script)
        writer.write(frames_of(0))
        report(writer.state)

    with child(task) as (pid, reports):
        while not (tmp_path / "runs").exists():
            time.sleep(0.01)
        os.killpg(pid, signal.SIGINT)
        assert json.loads(reports.readline())["chunks"] == 1


def test_missing_ffmpeg_names_imageio_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="pip install imageio-ffmpeg"):
        VideoWriter(tmp_path / "x.mp4")


def test_files_of_a_batch_are_numbered():
    assert str(numbered("run/x.mp4", 0, 1)) == "run/x.mp4"
    assert [str(numbered("run/x.y.mp4", video, 2)) for video in range(2)] == ["run/x.y-0.mp4", "run/x.y-1.mp4"]
