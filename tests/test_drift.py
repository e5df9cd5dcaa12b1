"""`tokentrim drift`: every measure is neutral without drift, and grows with drift of known size."""

import csv
import json
import os
import subprocess
import sys

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from research.training.world import Appearance, Scene, render
from tokentrim.tools.cli import main
from tokentrim.tools.drift import Drift, measure_convergence, measure_video, shorten
from tokentrim.tools.drift_plot import MAX_STRIPS, plot_drift
from tokentrim.tools.frames import find_videos, list_pictures, read_frames
from tokentrim.tools.measures import (
    LOOKS,
    Timeline,
    color_distance,
    color_histogram,
    color_similarity,
    fit_slope,
    reduce,
    video_drift_error,
)


HEIGHT, WIDTH, PERIOD, NUM_FRAMES = 48, 64, 8, 161  # the first frame, and 20 segments of 8 frames
PHASE = np.linspace(0, 1, NUM_FRAMES)  # of a drift
SIZES = (0.0, 0.1, 0.2, 0.4)  # of drifts


def pattern(place: float, seed: int = 0) -> np.ndarray:
    """Waves of three colors, moved right by `place` pixels, in [0.25, 0.75]."""
    x, y = np.meshgrid(np.arange(WIDTH) - place, np.arange(HEIGHT))
    shifts = np.random.default_rng(seed).uniform(0, 6, (3, 2))
    waves = [
        np.sin(2 * np.pi * 3 * x / WIDTH + a) + np.cos(2 * np.pi * (2 * x / WIDTH + 2 * y / HEIGHT) + b)
        for a, b in shifts
    ]
    return 0.5 + 0.125 * np.stack(waves, axis=-1)


def clip(seed: int = 0, speed: float = WIDTH / PERIOD / 8) -> np.ndarray:
    """A clip without drift, in [0, 1]. It moves back and forth, so that all segments show the same 8 frames."""
    return np.stack([pattern(speed * abs(t % PERIOD - PERIOD / 2), seed) for t in range(NUM_FRAMES)])


def edges() -> np.ndarray:
    """The same with sharp edges: colors of two levels."""
    return np.where(clip() > 0.5, 0.75, 0.25)


def texture(height: int, width: int, grain: float) -> np.ndarray:
    """Random colors (height, width, 3) with grains of some pixels."""
    uniform = np.random.default_rng(0).uniform(size=(height, width, 3))
    return (0.5 + 2 * grain * (cv2.GaussianBlur(uniform, (0, 0), grain) - 0.5)).clip(0, 1)


def over_time(size: float) -> np.ndarray:
    return (size * PHASE)[:, None, None, None]


def grey(frames: np.ndarray) -> np.ndarray:
    return (frames @ (0.299, 0.587, 0.114))[..., None]


def measure(frames: np.ndarray, name: str = "clip") -> Drift:
    return measure_video(name, (frames * 255).round().clip(0, 255).astype(np.uint8))


def blurred(frames: np.ndarray, size: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 1e-3 + 5 * size * t) for frame, t in zip(frames, PHASE)])


# Without drift


def test_a_clip_without_drift_is_neutral():
    measures = measure(clip()).measures()
    for name in ("color_similarity", "color_similarity_of_neighbors", "worst_similarity"):
        assert measures[name] == pytest.approx(100)
    assert measures["color_distance"] == pytest.approx(0, abs=1e-9)
    assert measures["motion_late_to_early"] == pytest.approx(1)
    for look in LOOKS:
        for measure_name in ("start_end_contrast", "slope", "vde"):
            assert measures[f"{look}_{measure_name}"] == pytest.approx(0, abs=1e-6)


def test_rendered_clips_hardly_drift():
    """In rendered clips, an object moves and nothing else changes."""
    generator, drifts = torch.Generator().manual_seed(0), []
    while len(drifts) < 4:
        scene = Scene.sample(generator)
        frames = render(scene, Appearance.sample(scene, generator), 120).permute(0, 2, 3, 1).numpy()
        if scene.change is None:
            drifts.append(measure(frames, f"world/{len(drifts)}.mp4"))
    for drift in drifts:
        measures = drift.measures()
        assert measures["color_similarity"] > 90 and measures["color_distance"] < 1
        assert all(abs(measures[f"{look}_slope"]) < 0.01 for look in ("brightness", "contrast", "saturation"))
        assert 0.85 < measures["motion_late_to_early"] < 1.15
    assert abs(measure_convergence(drifts)["convergence"]) < 1


def test_noise_hardly_counts_as_drift():
    noisy = clip() + np.random.default_rng(0).normal(0, 0.03, (NUM_FRAMES, HEIGHT, WIDTH, 3))
    measures = measure(noisy).measures()
    assert measures["color_similarity"] > 99 and measures["color_distance"] < 0.05
    assert all(abs(measures[f"{look}_slope"]) < 0.02 * measures[f"{look}_start"] for look in LOOKS)


# Drifts of known size


@pytest.mark.slow
def test_brightness_drift_is_measured():
    drifts = [measure(0.8 * clip() + over_time(size / 2)).measures() for size in SIZES]
    slopes = [each["brightness_slope"] for each in drifts]
    assert slopes == pytest.approx([size / 2 for size in SIZES], rel=0.01, abs=1e-3)
    assert [each["brightness_start_end_contrast"] for each in drifts] == pytest.approx(
        0.85 * np.array(slopes), rel=0.01, abs=1e-4
    )
    assert [each["color_distance"] for each in drifts] == pytest.approx(85 * np.array(slopes), rel=0.02, abs=0.01)
    assert all(abs(each[f"{look}_slope"]) < 0.005 for each in drifts for look in ("contrast", "sharpness", "motion"))
    assert_ordered(drifts, "brightness")
    darker = measure(0.8 * clip() + 0.1 - over_time(0.1)).measures()
    assert darker["brightness_slope"] == pytest.approx(-0.1, rel=0.01)


def test_contrast_drift_is_measured():
    drifts = [measure(0.5 + (edges() - 0.5) * (1 - over_time(size))).measures() for size in SIZES]
    expected = [-size * each["contrast_start"] for size, each in zip(SIZES, drifts)]
    assert [each["contrast_slope"] for each in drifts] == pytest.approx(expected, rel=0.1, abs=1e-3)
    assert all(abs(each["brightness_slope"]) < 0.002 and abs(each["sharpness_slope"]) < 0.02 for each in drifts)
    assert_ordered(drifts, "contrast")


def test_saturation_drift_is_measured():
    frames = clip()
    drifts = [measure(grey(frames) + (frames - grey(frames)) * (1 - over_time(size))).measures() for size in SIZES]
    assert drifts[-1]["saturation_slope"] == pytest.approx(-0.4 * drifts[0]["saturation_start"], rel=0.15)
    assert all(abs(each["brightness_slope"]) < 0.002 and abs(each["contrast_slope"]) < 0.002 for each in drifts)
    assert_ordered(drifts, "saturation")


def test_sharpness_drift_is_measured():
    drifts = [measure(blurred(edges(), size)).measures() for size in SIZES]
    slopes = [each["sharpness_slope"] for each in drifts]
    assert slopes[0] == pytest.approx(0, abs=1e-4) and all(slope < -0.3 for slope in slopes[1:])
    assert drifts[-1]["sharpness_end"] < 0.2 * drifts[0]["sharpness_end"]
    assert_ordered(drifts, "sharpness")


def assert_ordered(drifts: list[dict], look: str) -> None:
    """More drift means more VDE, more start-end contrast, and less similarity."""
    for name in (f"{look}_vde", f"{look}_start_end_contrast"):
        values = [each[name] for each in drifts]
        assert all(before < after for before, after in zip(values, values[1:])), (name, values)
    similarities = [each["color_similarity"] for each in drifts]
    assert all(before > after for before, after in zip(similarities, similarities[1:]))


def test_motion_ratio_is_measured():
    """In shares of the diagonal. Slower motion shows as the ratio of the speeds, no motion as 0."""
    even = measure(np.stack([pattern(1.5 * t) for t in range(NUM_FRAMES)])).measures()
    # The flow is underestimated at the borders, which are a large part of such small frames.
    assert even["motion_start"] == pytest.approx(1.5 / np.hypot(HEIGHT, WIDTH), rel=0.15)
    assert even["motion_late_to_early"] == pytest.approx(1, abs=0.05)
    speed = 2 - 1.5 * PHASE
    slower = measure(np.stack([pattern(place) for place in np.cumsum(speed)])).measures()
    assert slower["motion_late_to_early"] == pytest.approx(speed[-24:].mean() / speed[:24].mean(), rel=0.1)
    assert slower["motion_slope"] < 0
    large = np.stack([np.roll(texture(6 * HEIGHT, 6 * WIDTH, 2), 4 * t, axis=1) for t in range(21)])  # is reduced
    assert measure(large).measures()["motion_start"] == pytest.approx(4 / np.hypot(6 * HEIGHT, 6 * WIDTH), rel=0.05)
    frozen = measure(np.stack([pattern(1.5 * min(t, 100)) for t in range(NUM_FRAMES)])).measures()
    assert frozen["motion_late_to_early"] == 0
    still = measure(np.stack([pattern(0)] * NUM_FRAMES)).measures()
    assert still["motion_late_to_early"] is None and still["motion_vde"] is None


def test_fading_and_blur_do_not_count_as_loss_of_motion():
    frames = np.stack([np.roll(texture(HEIGHT, WIDTH, 1), 2 * t, axis=1) for t in range(NUM_FRAMES)])
    for drifting in (0.5 + (frames - 0.5) * (1 - over_time(0.8)), blurred(frames, 0.6)):
        measures = measure(drifting).measures()
        assert measures["contrast_end"] < 0.5 * measures["contrast_start"]
        assert measures["motion_late_to_early"] == pytest.approx(1, abs=0.1)


def test_worst_segment_is_found_although_the_end_equals_the_start():
    frames = clip()
    frames[1 + 8 * 11 : 1 + 8 * 12] = frames[1 + 8 * 11 : 1 + 8 * 12, ..., ::-1] * (0.2, 1, 0.5)
    measures = measure(frames).measures()
    assert (measures["worst_first_frame"], measures["worst_last_frame"]) == (89, 96)
    assert measures["color_similarity"] == pytest.approx(100) and measures["worst_similarity"] < 60


@pytest.mark.slow
def test_convergence_is_measured():
    """Videos that move a share of the distance to one color lose that share of their distances."""

    def converge(share):
        videos = [
            0.5 * clip(seed) + 0.5 * np.array(color) for seed, color in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1)])
        ]
        return measure_convergence(
            [measure(video * (1 - over_time(share)) + over_time(share) * 0.5) for video in videos]
        )

    for share in (-0.3, 0, 0.4, 0.8):
        start, end = 1 - share * 0.075, 1 - share * 0.925
        assert converge(share)["convergence"] == pytest.approx(100 * (1 - end / start), abs=2)
    assert measure_convergence([measure(clip())])["convergence"] is None
    assert measure_convergence([measure(clip())] * 2) == {"spread_start": 0, "spread_end": 0, "convergence": None}


# The formulas


def test_color_histogram_shares_a_color_among_its_neighbors():
    def histogram(*color):
        return color_histogram(np.full((4, 4, 3), color, np.uint8)).reshape(8, 8, 8)

    assert histogram(0, 0, 0)[0, 0, 0] == 1 and histogram(255, 0, 255)[7, 0, 7] == pytest.approx(1)
    between = histogram(0, 18, 0)  # levels are 36.4 apart
    assert between[0, 0, 0] == pytest.approx(0.5, abs=0.06) and between[0, 1, 0] == pytest.approx(0.5, abs=0.06)
    random = color_histogram(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert random.sum() == pytest.approx(1) and random.min() >= 0


def test_color_similarity_and_distance():
    black, white, red = np.zeros(512), np.zeros(512), np.zeros(512)
    black[0], white[-1], red[7 * 64] = 1, 1, 1
    assert color_similarity(black, black) == 100 and color_similarity(black, white) == 0
    assert color_similarity(black, (black + white) / 2) == 50
    assert color_distance(black, white) == pytest.approx(100)
    assert color_distance(black, red) == pytest.approx(100 / 3) and color_distance(red, red) == 0


def test_video_drift_error_is_the_published_sum():
    values = np.random.default_rng(0).uniform(1, 2, 20)
    chunks = [(values[2 * i] + values[2 * i + 1]) / 2 for i in range(10)]
    expected = sum((10 - i + 1) * abs(chunks[i - 1] - chunks[0]) / chunks[0] for i in range(2, 11))
    assert video_drift_error(values) == pytest.approx(expected)
    assert video_drift_error(np.zeros(20)) is None


def test_slope_is_the_change_over_the_video():
    assert fit_slope(3 + 2 * (np.arange(20) + 0.5) / 20) == pytest.approx(2)


@pytest.mark.parametrize("count", [20, 63, 64, 65, 1000])
def test_timeline_is_short_with_correct_means(count):
    rows = np.random.default_rng(count).uniform(size=(count, 2))
    timeline = Timeline(limit=64)
    for row in rows:
        timeline.add(row)
    assert len(timeline.sums) <= 64
    means, ends = timeline.split(4)
    assert ends[-1] == count and np.abs(ends - count * np.arange(1, 5) / 4).max() <= timeline.length
    expected = [part.mean(axis=0) for part in np.split(rows, ends[:-1])]
    np.testing.assert_allclose(means, expected)


def test_large_frames_are_reduced_by_whole_factors():
    assert [reduce(np.zeros((*size, 3), np.uint8)).shape[:2] for size in ((480, 832), (720, 1280), (64, 64))] == [
        (240, 416),
        (240, 426),
        (64, 64),
    ]


@pytest.mark.slow
def test_long_videos_need_bounded_memory():
    drift = measure_video("long", (np.full((16, 16, 3), number % 256, np.uint8) for number in range(3000)))
    assert drift.num_frames == 3000 and drift.ends[-1] == 3000
    assert 64 <= len(drift.thumbnails) <= 128 and drift.looks.shape == (20, 5)


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One clip as a file of each format and as pictures, and a drifting clip."""
    folder = tmp_path_factory.mktemp("videos")
    frames = (clip() * 255).round().astype(np.uint8)
    (folder / "pictures").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "pictures" / f"{number}.png")
    iio.imwrite(folder / "clip.mp4", frames, plugin="FFMPEG", fps=16, codec="libx264", quality=10, macro_block_size=2)
    iio.imwrite(folder / "clip.webm", frames, plugin="FFMPEG", fps=16, codec="libvpx", quality=10, macro_block_size=2)
    iio.imwrite(folder / "clip.gif", frames, duration=60)
    brighter = ((0.8 * clip() + over_time(0.2)) * 255).round().astype(np.uint8)
    (folder / "other").mkdir()
    iio.imwrite(folder / "other" / "drift.mp4", brighter, plugin="FFMPEG", fps=16, codec="libx264", macro_block_size=2)
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.mark.slow
def test_every_file_format_gives_the_same_measures(folder):
    paths = find_videos([folder])
    assert [path.name for path in paths] == ["clip.gif", "clip.mp4", "clip.webm", "pictures"]
    expected = measure(clip()).measures()
    for path in paths:
        drift = measure_video(str(path), read_frames(path))
        assert drift.num_frames == NUM_FRAMES
        measures = drift.measures()
        assert measures["color_similarity"] > 97 and abs(measures["brightness_slope"]) < 0.002
        if path.name == "pictures":
            assert measures == expected


def test_pictures_are_sorted_by_number(tmp_path):
    for number in (10, 9, 1):
        Image.new("RGB", (4, 4)).save(tmp_path / f"frame{number}.png")
    assert [path.stem for path in list_pictures(tmp_path)] == ["frame1", "frame9", "frame10"]


@pytest.mark.slow
def test_the_command(folder, tmp_path, capsys):
    arguments = ["drift", str(folder / "clip.mp4"), str(folder / "pictures"), str(folder / "other")]
    options = {name: tmp_path / f"drift.{name}" for name in ("json", "csv", "png")}
    arguments += ["--json", str(options["json"]), "--csv", str(options["csv"]), "--plot", str(options["png"])]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for title in ("Colors at the end", "Slopes", "Start-end contrast", "VDE", "Convergence", "other/drift"):
        assert title in printed.out

    report = json.loads(options["json"].read_text())
    assert [video["num_frames"] for video in report["videos"]] == [NUM_FRAMES] * 3
    assert report["convergence"].keys() == {str(folder), str(folder / "other")}
    assert all(len(values) == 20 for video in report["videos"] for values in video["segments"].values())
    with options["csv"].open() as file:
        rows = list(csv.DictReader(file))
    for row, video in zip(rows, report["videos"]):
        assert row["video"] == video["video"]
        assert {name: float(row[name]) for name in video["measures"]} == pytest.approx(video["measures"])
    assert float(rows[2]["brightness_slope"]) == pytest.approx(0.2, rel=0.05)
    with Image.open(options["png"]) as figure:
        assert figure.width > 800 and figure.height > 500

    before = options["json"].read_bytes()
    assert main(arguments) == 0 and options["json"].read_bytes() == before


@pytest.mark.parametrize("count", [1, 3, MAX_STRIPS + 1])
def test_figure_works_for_any_number_of_videos(count):
    """Few videos: a line and a strip for each. Many videos: the median and eight strips."""
    drift = measure(clip())
    figure = plot_drift([Drift(f"{number}.mp4", *list(vars(drift).values())[1:]) for number in range(count)])
    above, below = figure.subfigs
    assert len(above.axes) == 2 * min(count, MAX_STRIPS) and len(below.axes) == 6
    num_lines = count + 1 if count > MAX_STRIPS else count
    assert len(below.axes[1].lines) == num_lines and len(below.axes[0].lines) == num_lines + (count > 1)
    figure.canvas.draw()


def test_names_of_videos_are_distinguished():
    assert shorten(["out/a.mp4", "out/b.mp4"]) == ["a", "b"]
    assert shorten(["x/a.mp4", "y/a.mp4"]) == ["x/a", "y/a"]
    assert shorten(["x" * 30 + "y" * 30])[0] == "x" * 19 + ".." + "y" * 19


# Wrong input


def test_a_video_that_fails_does_not_stop_the_others(folder, tmp_path, capsys):
    whole = (folder / "clip.mp4").read_bytes()
    (tmp_path / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.gif").write_text("no video")
    (tmp_path / "zgood.mp4").write_bytes(whole)
    (tmp_path / "short").mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32)).save(tmp_path / "short" / f"{number}.png")
    assert main(["drift", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert [line.split(": ")[2].split(" ")[0] for line in errors] == [
        str(tmp_path / name) for name in ("broken.mp4", "empty.mp4", "short", "text.gif")
    ]
    assert all(line.startswith("tokentrim drift: error: ") for line in errors)
    assert "cannot be decoded as a video: " in errors[0] and "has fewer than 21 frames" in errors[2]
    assert "zgood" in printed.out


def test_truncated_file_is_reported(tmp_path, capsys, caplog):
    """The header comes first and promises more frames."""
    path = tmp_path / "cut.mp4"
    frames = (np.random.default_rng(0).uniform(size=(90, HEIGHT, WIDTH, 3)) * 255).astype(np.uint8)
    options = {"codec": "libx264", "macro_block_size": 2, "output_params": ["-movflags", "+faststart"]}
    iio.imwrite(path, frames, plugin="FFMPEG", fps=15, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(list(read_frames(path))) < 60
    assert f"{path} ends after" in caplog.text and "of about 90 frames" in caplog.text


@pytest.mark.parametrize(
    "name, message",
    [("none.mp4", "none.mp4 does not exist."), ("folder", "folder holds no video: no file ending in .mp4")],
)
def test_paths_without_a_video_raise(name, message, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    assert main(["drift", str(tmp_path / name)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("tokentrim drift: error: ") and message in printed.err


def test_pictures_of_two_sizes_raise(tmp_path):
    for number, size in enumerate([(8, 6), (8, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="1.png is 8 x 8, the pictures before it 8 x 6."):
        list(read_frames(tmp_path))
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="0.png is no complete picture"):
        list(read_frames(tmp_path))


def test_unknown_figure_format_raises_before_reading(capsys):
    with pytest.raises(SystemExit) as end:
        main(["drift", "none.mp4", "--plot", "drift.doc"])
    assert end.value.code == 2 and "--plot must end with .png, .pdf or .svg" in capsys.readouterr().err


def test_drift_does_not_import_torch(folder, tmp_path):
    (tmp_path / "tokentrim").symlink_to(ROOT)
    script = "import sys; from tokentrim.tools.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", script, "drift", str(folder / "clip.mp4")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0 and "Colors at the end" in process.stdout, process.stderr
