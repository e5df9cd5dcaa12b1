"""Rollouts side by side: the measure of color drift, pictures, and what is printed."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from test_output import CHUNK_FRAMES, GRID, decision, make_output

from tokentrim import TokenTrimPipelineOutput
from tokentrim.tokentrim_frames.colors import color_drift, end_of
from tokentrim.tokentrim_frames.comparison import Comparison


def fading(num_chunks=12, change=1.0):
    """Gray that becomes darker by `change` percent of white with each chunk of 2 frames: uint8 (frames, 16, 16, 3)."""
    levels = (200 - 2.55 * change * np.arange(num_chunks)).round().astype(np.uint8).repeat(2)
    return np.tile(levels[:, None, None, None], (1, 16, 16, 3))


def test_color_drift_is_the_change_in_percent_of_white():
    drift = color_drift(fading(), [2] * 12)
    np.testing.assert_allclose(drift[2:], np.arange(2, 12) - 1, atol=0.4)  # the start is the mean of chunks 0 to 2
    assert end_of(drift) == pytest.approx(9, abs=0.4)
    assert color_drift(fading(change=0), [2] * 12).max() == 0
    black_to_white = np.zeros((8, 16, 16, 3), np.uint8)
    black_to_white[6:] = 255
    assert color_drift(black_to_white, [2] * 4)[3] == pytest.approx(100)


def test_color_drift_ignores_motion_along_a_row_and_sees_what_the_mean_does_not():
    frames = np.full((8, 32, 32, 3), 128, np.uint8)
    for frame in range(8):
        frames[frame, 12:16, 4 * frame : 4 * frame + 4] = (255, 0, 0)
    assert color_drift(frames, [2] * 4).max() < 1
    stripes = np.full((8, 32, 32, 3), 128, np.uint8)
    stripes[6:, ::2], stripes[6:, 1::2] = 78, 178  # the same mean
    assert color_drift(stripes, [2] * 4)[3] == pytest.approx(50 / 2.55, abs=0.5)


def test_color_drift_of_the_top_leaves_out_what_is_below():
    frames = np.full((8, 40, 32, 3), 128, np.uint8)
    frames[4:, 12:] = 0
    assert color_drift(frames, [2] * 4, top=0.3).max() < 1e-9 < 1 < color_drift(frames, [2] * 4)[3]
    with pytest.raises(ValueError, match="`top` must be a number above 0, up to 1, but is 0"):
        color_drift(frames, [2] * 4, top=0)


def make_comparison():
    held = [decision(0), {**decision(1), "reanchored": "held"}, {**decision(2, [0, 7]), "reanchored": "held"}]
    frames = np.random.default_rng(0).random((1, 8, 16, 32, 3))
    outputs = {"plain": frames, "tokentrim_plus": frames / 2}
    decisions = {"plain": [decision(chunk) for chunk in range(3)], "tokentrim_plus": held}
    return Comparison(
        {name: TokenTrimPipelineOutput(outputs[name], [decisions[name]], GRID, CHUNK_FRAMES, 8.0) for name in outputs}
    )


def test_print_has_a_line_for_each_rollout():
    first, second = str(make_comparison()).splitlines()
    assert first.startswith("plain           colors end ") and first.endswith("start; changed nothing")
    assert second.endswith("away from the start; held 2 of 3 chunks, trimmed 1 of 3 chunks")


def test_side_by_side_has_a_labeled_column_for_each_rollout(tmp_path):
    comparison = make_comparison()
    video = comparison.side_by_side(side=64)
    columns, header = 2 * 128 + 8, 2 * 12
    assert video.shape == (8, header + 64, columns, 3)
    for name, column in (("plain", video[3, header:, :128]), ("tokentrim_plus", video[3, header:, 136:])):
        reduced = column.reshape(16, 4, 32, 4, 3).mean(axis=(1, 3))
        assert (
            np.corrcoef(reduced.ravel(), comparison.videos[name][3].ravel())[0, 1] > 0.95
        )  # of noise, which a smooth picture cannot follow
    same_size = comparison.picture(3, side=16)[24:, :32]
    np.testing.assert_array_equal(same_size, comparison.videos["plain"][3])
    for label in (video[0, :header, :128], video[0, :header, 136:]):
        assert label.min() < 100 and label.max() == 255
    path = comparison.save_video(tmp_path / "x.mp4")
    assert iio.imread(path, plugin="FFMPEG").shape[1:3] == (288 + 72, 2 * 576 + 8)  # 288 pixels a side, at least
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 8


def test_filmstrip_has_a_labeled_row_for_each_rollout_and_borders_where_something_happened():
    strip = make_comparison().filmstrip(columns=3, side=32)
    assert strip.shape == (22 + 2 * 32, 4 * 64, 3)
    corners = strip[22::32, 64::64]
    np.testing.assert_array_equal(corners[0], [[255] * 3] * 3)
    np.testing.assert_array_equal(corners[1], [[255] * 3, [255] * 3, [214, 39, 40]])


def test_plot_begins_with_what_the_eye_sees():
    comparison = make_comparison()
    figure = comparison.plot_drift()
    strips, drift, severities = figure.axes[:2], figure.axes[2], figure.axes[3:]
    assert all(axis.images for axis in strips) and len(severities) == 2
    assert [line.get_label() for line in drift.lines] == ["plain", "tokentrim_plus"]
    np.testing.assert_allclose(drift.lines[0].get_ydata(), comparison.drifts["plain"])
    page = comparison._repr_html_()
    assert page.count("<video") == 1 and page.count("<img") == 1 and "held 2 of 3 chunks" in page


def test_videos_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="`outputs` must be a dict of at least one output"):
        Comparison({})
    short = TokenTrimPipelineOutput(np.zeros((1, 4, 16, 32, 3)), [[decision(0)]], GRID, [4])
    with pytest.raises(ValueError, match="`outputs` must be of videos that are equally long and large"):
        Comparison({"long": make_output(), "short": short})
    latents = TokenTrimPipelineOutput(torch.zeros(1, 4, 3, 2, 4), [[decision(0)]], GRID)
    with pytest.raises(ValueError, match="`output_type`"):
        Comparison({"latents": latents})
