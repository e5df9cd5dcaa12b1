"""The verdict of `tokentrim drift`: a sentence, two videos side by side, an exit code, convergence of prompts."""

import json
import re
import shutil
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT

from tokentrim.tokentrim_frames.mp4 import save_video
from tokentrim.tools.cli import main
from tokentrim.tools.decoding import read_rate
from tokentrim.tools.drift import judge, measure_convergence, measure_video
from tokentrim.tools.verdict import describe, exceeding, format_verdicts


DOCS = ROOT / "docs" / "drift.md"
NUM_FRAMES = 161  # the first one, and 20 segments of 8


def clip(drift=0.0, start=0, content=0.0, seed=0):
    """Noise around gray that becomes brighter by `drift` of 255 levels from a frame on, and sways by `content`."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (24, 32, 3))
    times = np.arange(NUM_FRAMES)
    levels = 0.4 + drift * np.clip((times - start) / max(NUM_FRAMES - start, 1), 0, 1) + content * (times // 8 % 2)
    frames = levels[:, None, None, None] + noise
    return (255 * frames).round().clip(0, 255).astype(np.uint8)


def measure(name="x.mp4", fps=16.0, prompt=None, **options):
    return measure_video(name, clip(**options), fps, prompt)


def test_a_still_video_does_not_drift():
    verdict = judge(measure())
    assert not verdict.drifts and verdict.distance == pytest.approx(0, abs=0.01) and verdict.first_frame is None
    assert describe(measure(), "x.mp4") == "x.mp4 does not drift: colors end 0.0 away from the start."


@pytest.mark.parametrize("start", [0, 40, 80, 120])
def test_the_verdict_says_how_far_and_from_when(start):
    drift = measure(drift=0.3, start=start)
    verdict = judge(drift)
    late = np.clip((np.arange(137, 161) - start) / (NUM_FRAMES - start), 0, 1).mean()
    early = np.clip((np.arange(1, 25) - start) / (NUM_FRAMES - start), 0, 1).mean()
    assert verdict.drifts and verdict.distance == pytest.approx(30 * (late - early), rel=0.05)
    limit = max(1, 2 * verdict.content) / 30 + early  # as a share of the drift
    assert abs(verdict.first_frame - (start + (NUM_FRAMES - start) * limit)) <= 9  # a segment has 8 frames
    text = describe(drift, "x.mp4")
    assert text.startswith(f"x.mp4 drifts: colors end {verdict.distance:.1f} away from the start, ")
    assert text.endswith(f"; it begins at {verdict.first_frame / 16:.1f} s.")
    assert describe(measure(drift=0.3, start=start, fps=None), "x").endswith(f"begins at frame {verdict.first_frame}.")


def test_content_that_moves_as_much_is_no_drift():
    """Colors that sway by 10% from segment to segment hide a drift of 10%, and not one of 30%."""
    assert judge(measure(content=0.1)).content > 5
    assert not judge(measure(content=0.1, drift=0.1)).drifts
    swaying = measure(content=0.1, drift=0.1)
    assert describe(swaying, "x").endswith(
        f" away from the start, and its content moves them by {judge(swaying).content:.1f}."
    )
    assert judge(measure(content=0.1, drift=0.3)).drifts and judge(measure(drift=0.1)).drifts


def test_a_video_that_comes_back_does_not_drift():
    frames = clip(drift=0.3)
    assert not judge(measure_video("x", np.concatenate([frames, frames[::-1]]))).drifts


def test_two_videos_are_compared_and_many_are_counted():
    pair = [measure("a/plain.mp4", drift=0.3), measure("a/held.mp4")]
    lines = format_verdicts(pair).splitlines()
    assert lines[0].startswith("plain.mp4 drifts: ") and lines[1].startswith("held.mp4 does not drift: ")
    assert lines[2].startswith("held.mp4 ends closer to its start than plain.mp4: 0.0 instead of ")
    same = [measure("a/x.mp4", drift=0.3), measure("b/x.mp4")]
    assert format_verdicts(same).splitlines()[0].startswith("a/x.mp4 drifts: ")
    many = [measure(f"a/{number}.mp4", drift=0.3 * (number > 2)) for number in range(6)]
    assert format_verdicts(many).startswith("a: 3 of 6 videos drift; colors end ")


def test_videos_beyond_the_largest_distance_are_named():
    drifts = [measure("a.mp4", drift=0.3), measure("b.mp4")]
    distance = judge(drifts[0]).distance
    assert exceeding(drifts, distance) == [] and exceeding(drifts, 0.1) != []
    assert exceeding(drifts, 5) == [f"a.mp4 has a color distance of {distance:.2f}, more than --max-distance 5."]


def test_only_videos_of_different_prompts_converge():
    """Those of one prompt are alike from the start."""
    prompts = ["a fox", "a fox", "a whale"]
    drifts = [measure(f"{number}.mp4", drift=0.1 * number, prompt=each) for number, each in enumerate(prompts)]
    assert measure_convergence(drifts[:2])["convergence"] is None
    pairs = [measure_convergence([drifts[a], drifts[b]])["spread_end"] for a, b in ((0, 2), (1, 2))]
    assert measure_convergence(drifts)["spread_end"] == pytest.approx(np.mean(pairs))


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "32x24"]
    for name, drift in (("plain.mp4", 0.4), ("held.mp4", 0.0), ("third.mp4", 0.2)):
        options = ["-r", "16", "-i", "-", "-crf", "4", "-pix_fmt", "yuv420p", str(folder / name)]
        subprocess.run([*command, *options], input=clip(drift, 80).tobytes(), check=True)
    return folder


def test_the_command_begins_with_the_verdict(folder, capsys):
    assert read_rate(folder / "plain.mp4") == 16 and read_rate(folder) is None
    assert main(["drift", str(folder / "plain.mp4")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("plain.mp4 drifts: colors end ") and " it begins at 5." in first and first.endswith(" s.")


def test_two_files_stand_side_by_side(folder, capsys, tmp_path):
    videos = [str(folder / "plain.mp4"), str(folder / "held.mp4")]
    assert main(["drift", *videos, "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    (header,) = (line for line in out.splitlines() if line.split() == ["plain", "held", "no", "drift"])
    assert header and "Convergence" not in out and "color distance, end to start" in out
    verdicts = [video["verdict"] for video in json.loads((tmp_path / "x.json").read_text())["videos"]]
    assert [each["drifts"] for each in verdicts] == [True, False] and verdicts[1]["first_frame"] is None


@pytest.mark.parametrize("limit, code", [("0", 3), ("1", 3), ("99", 0), ("1e9", 0)])
def test_the_exit_code_says_whether_a_video_is_beyond_the_limit(limit, code, folder, capsys):
    assert main(["drift", str(folder / "plain.mp4"), "--max-distance", limit]) == code
    assert ("more than --max-distance" in capsys.readouterr().err) == (code == 3)


@pytest.mark.parametrize("limit", ["-1", "nan", "inf", "x", ""])
def test_a_limit_that_is_no_distance_is_refused(limit, folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["drift", str(folder), f"--max-distance={limit}"])
    assert end.value.code == 2 and "--max-distance" in capsys.readouterr().err


def test_an_unreadable_video_is_no_pass(folder, tmp_path, capsys):
    (tmp_path / "x.mp4").write_text("no video")
    assert main(["drift", str(tmp_path / "x.mp4"), str(folder / "held.mp4"), "--max-distance", "99"]) == 1


def test_prompts_come_from_the_records_beside_videos(folder, tmp_path, capsys):
    for name, prompt in (("plain", "a fox"), ("held", "a fox"), ("third", "a fox")):
        shutil.copy(folder / f"{name}.mp4", tmp_path)
        (tmp_path / f"{name}.json").write_text(json.dumps({"prompt": prompt}))
    assert main(["drift", str(tmp_path)]) == 0
    assert "Convergence" not in capsys.readouterr().out
    (tmp_path / "third.json").write_text(json.dumps({"prompt": "a whale"}))
    assert main(["drift", str(tmp_path)]) == 0
    assert "Convergence" in capsys.readouterr().out


def test_the_page_quotes_what_the_command_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (quoted,) = re.findall(r"`tokentrim (drift [^`]+)` says:\n\n```text\n(.*?)\n```", DOCS.read_text(), flags=re.S)
    assert main(quoted[0].split()) == 0
    assert capsys.readouterr().out.split("\n\n")[0] == quoted[1]


def test_only_the_top_is_measured_where_that_is_asked_for(tmp_path, capsys):
    frames = clip()
    frames[:, 12:] = clip(drift=0.4)[:, 12:]
    save_video(tmp_path / "x.mp4", frames, 16)
    for top, drifts in (("1", True), ("0.6", True), ("0.5", False), ("0.001", False)):
        assert main(["drift", str(tmp_path / "x.mp4"), "--top", top]) == 0
        assert capsys.readouterr().out.startswith("x.mp4 drifts: ") == drifts, top
    for top in ("0", "1.1", "nan", "-1"):
        with pytest.raises(SystemExit):
            main(["drift", str(tmp_path / "x.mp4"), f"--top={top}"])


def test_cuts_are_counted_and_drift_is_none():
    frames = np.random.default_rng(1).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    scenes = np.concatenate([frames[[scene] * 30] for scene in (0, 1, 0, 2)])
    assert measure_video("x", scenes).measures()["cuts"] == 3
    fading = (frames[[0] * 60] * np.linspace(1, 0.2, 60)[:, None, None, None]).astype(np.uint8)
    moving = np.stack([np.roll(frames[0], frame // 2, axis=1) for frame in range(60)])
    for still in (fading, moving, np.full((60, 48, 64, 3), 90, np.uint8)):
        assert measure_video("x", still).measures()["cuts"] == 0
