"""Pictures of a run's decisions."""

import base64
import resource
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from builders import full_pipeline, generators
from diffusers import FlowMatchLCMScheduler
from PIL import Image

from tokentrim import TokenTrimPipelineOutput


RED = np.array([0xD6, 0x27, 0x28]) / 255
CHUNK_FRAMES = [2, 3, 3]
GRID = (2, 4)  # tokens of 8x8 pixels


def decision(chunk, tokens=(), quarantined=False):
    severity = None if chunk == 0 else 1.0 + len(tokens)
    return {
        "chunk": chunk,
        "severity": severity,
        "threshold": 1.5 if chunk == 2 else None,
        "trim": bool(tokens),
        "tokens": list(tokens),
        "regenerated_severity": 0.5 if tokens else None,
        "quarantined": quarantined,
        "reanchored": None,
    }


def make_output(frames=None):
    """Two gray videos; the second one lost two tokens at its last chunk."""
    frames = np.full((2, 8, 16, 32, 3), 0.5) if frames is None else frames
    decisions = [[decision(0), decision(1), decision(2)], [decision(0), decision(1), decision(2, [0, 7])]]
    return TokenTrimPipelineOutput(frames, decisions, GRID, CHUNK_FRAMES)


def is_red(pixels):
    return np.isclose(pixels, RED).all(axis=-1)


def test_quarantined_chunks_are_framed_and_marked():
    output = make_output()
    output.decisions[0][1] = decision(1, quarantined=True)
    corners = output.filmstrip().reshape(2, 20, 3, 36, 3)[:, 0, :, 0]
    assert np.allclose(corners[0, 1], np.array([0x7B, 0x32, 0x94]) / 255)
    assert np.allclose(corners[0, [0, 2]], 1) and is_red(corners[1, 2])
    first, second = output.plot_drift().axes
    labels = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in (first, second)]
    assert "quarantined" in labels[0] and "quarantined" not in labels[1]


def test_overlay_outlines_evicted_tokens_on_the_frames_of_their_chunk():
    output = make_output()
    overlay = output.overlay_evictions()
    assert (output.frames == 0.5).all()
    expected = np.zeros((2, 8, 16, 32), dtype=bool)
    expected[1, 5:, :8, :8] = expected[1, 5:, 8:, 24:] = True  # tokens 0 and 7
    expected[1, 5:, 1:7, 1:7] = expected[1, 5:, 9:15, 25:31] = False  # but for their inside
    np.testing.assert_array_equal(is_red(overlay), expected)
    white = (overlay == 1).all(axis=-1)
    assert white.sum() == 3 * 2 * (6 * 6 - 4 * 4) and not (white & expected).any()  # a second line inside
    assert (overlay[~(expected | white)] == 0.5).all()


def test_every_decoded_output_type_looks_the_same():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 32, 3), dtype=np.uint8)
    expected = make_output(frames / 255).overlay_evictions()
    as_tensor = torch.from_numpy(frames / 255).permute(0, 1, 4, 2, 3)
    as_pil = [[Image.fromarray(frame) for frame in video] for video in frames]
    for same in (as_tensor, as_pil):
        np.testing.assert_allclose(make_output(same).overlay_evictions(), expected, atol=1e-6)


def test_filmstrip_shows_the_middle_of_each_chunk_and_frames_the_trimmed_ones():
    frames = np.zeros((2, 8, 16, 32, 3)) + np.arange(8)[:, None, None, None] / 10
    strip = make_output(frames).filmstrip()
    assert strip.shape == (2 * (16 + 4), 3 * (32 + 4), 3)  # two pixels around each frame
    inside = strip.reshape(2, 20, 3, 36, 3)[:, 2:-2, :, 2:-2]
    np.testing.assert_allclose(inside[0].mean(axis=(0, 2, 3)), [0.1, 0.3, 0.6])
    cell = strip.reshape(2, 20, 3, 36, 3)[:, 0, :, 0]  # a corner of each
    np.testing.assert_array_equal(is_red(cell), [[False] * 3, [False, False, True]])
    assert make_output(frames).filmstrip(columns=1).shape[1] == 2 * 36  # the first and the last are always there
    with pytest.raises(ValueError, match="`columns` must be an int >= 1, but is 0"):
        make_output().filmstrip(columns=0)


def test_plot_drift_shows_severities_thresholds_and_triggers():
    figure = make_output().plot_drift()
    assert len(figure.axes) == 2
    severity, threshold, trimmed, regenerated = (line.get_xydata() for line in figure.axes[1].lines)
    np.testing.assert_array_equal(severity, [[0, np.nan], [1, 1], [2, 3]])
    np.testing.assert_array_equal(threshold, [[0, np.nan], [1, np.nan], [2, 1.5]])
    np.testing.assert_array_equal(trimmed, [[2, 3]])
    np.testing.assert_array_equal(regenerated, [[2, 0.5]])


def test_save_video(tmp_path):
    frames = np.full((2, 8, 16, 32, 3), 0.5)
    frames[1] = 1.0
    path = make_output(frames).save_video(tmp_path / "second.mp4", fps=8, video=1)
    assert path == tmp_path / "second.mp4"
    video = iio.imread(path, plugin="FFMPEG")
    assert video.shape == (8, 16, 32, 3) and video.min() > 250
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 8
    with pytest.raises(ValueError, match="`video` must be an int from 0 to 1, but is 2"):
        make_output().save_video(tmp_path / "no.mp4", video=2)
    with pytest.raises(ValueError, match="`fps` must be a number from 0.01 to 1000, but is 0"):
        make_output().save_video(tmp_path / "no.mp4", fps=0)


def test_failed_save_raises_and_keeps_the_old_file(tmp_path):
    frames = np.random.default_rng(0).random((2, 8, 64, 64, 3))
    path = make_output(frames).save_video(tmp_path / "x.mp4", fps=8, video=0)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            make_output(frames).save_video(tmp_path / "x.mp4", fps=8, video=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.mp4"]
    with pytest.raises(ValueError, match="`path` must end with .mp4, but is .*x.gif"):
        make_output(frames).save_video(tmp_path / "x.gif")


def test_looking_at_latents_raises(tmp_path):
    output = TokenTrimPipelineOutput(torch.zeros(2, 4, 9, 2, 4), make_output().decisions, GRID)
    output.plot_drift()
    for look in (output.overlay_evictions, output.filmstrip, lambda: output.save_video(tmp_path / "no.mp4")):
        with pytest.raises(ValueError, match="`output_type` must be 'np', 'pt' or 'pil'"):
            look()


@pytest.mark.parametrize(
    "module, packages", [("matplotlib.figure", "matplotlib"), ("imageio_ffmpeg", "imageio-ffmpeg")]
)
def test_a_missing_package_is_named_with_the_command(module, packages, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    look = make_output().plot_drift if "matplotlib" in module else lambda: make_output().save_video(tmp_path / "a.mp4")
    with pytest.raises(ImportError, match=f"{module} is not installed: `pip install {packages}`"):
        look()


def test_print_says_what_was_done():
    output = make_output()
    output.decisions[0] = [decision(0), decision(1, quarantined=True), {**decision(2), "reanchored": "held"}]
    assert str(output).splitlines() == [
        "video 0: 3 chunks (0.5 s): 1 held, 0 trimmed, 1 quarantined",
        "video 1: 3 chunks (0.5 s): 0 held, 1 trimmed, 0 quarantined",
    ]
    assert repr(output).startswith(
        "<TokenTrimPipelineOutput: frames (2, 8, 16, 32, 3); video 0: 3 chunks (0.5 s): 1 held"
    )
    released = [[{**decision(0), "reanchored": "watched"}]]
    one = TokenTrimPipelineOutput(output.frames[:1], released, GRID, [8], fps=2.0)
    assert str(one) == "1 chunk (4.0 s): 0 held, 1 released, 0 trimmed, 0 quarantined"
    latents = TokenTrimPipelineOutput(torch.zeros(1, 4, 3, 2, 4), [[decision(0)]], GRID)
    assert str(latents) == "1 chunk: 0 held, 0 trimmed, 0 quarantined"


def test_notebooks_show_videos_what_was_done_and_severities(monkeypatch):
    page = make_output()._repr_html_()
    assert page.count("<video") == 2 and "data:image/png;base64," in page and "1 trimmed" in page
    video = base64.b64decode(page.split("data:video/mp4;base64,")[1].split("'")[0])
    assert iio.imread(video, plugin="FFMPEG", extension=".mp4").shape == (8, 16, 32, 3)
    latents = TokenTrimPipelineOutput(torch.zeros(2, 4, 9, 2, 4), make_output().decisions, GRID)._repr_html_()
    assert "<video" not in latents and "data:image/png" in latents
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    page = make_output()._repr_html_()
    assert "no video: imageio_ffmpeg is not installed" in page and "data:" not in page and "1 trimmed" in page


def test_chunks_and_streams_say_what_was_done():
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0))
    prompt = "a red circle moving right over a blue background"
    call = {"num_frames": 33, "generator": generators(0), "method": "tokentrim_plus"}
    with pipe.stream(prompt, **call) as stream:
        assert str(stream) == "0 of 3 chunks (0.0 of 2.1 s): 0 held, 0 trimmed, 0 quarantined"
        first, second = next(stream), next(stream)
        assert (str(first), str(second)) == ("chunk 0: accepted", "chunk 1: held")
        assert repr(second) == "<Chunk 1, latents (1, 4, 3, 4, 6): held>"
        assert second._repr_html_().count("<video") == 1 and "chunk 1: held" in second._repr_html_()
        told = "2 of 3 chunks (1.3 of 2.1 s): 1 held, 0 trimmed, 0 quarantined"
        assert repr(stream) == f"<Stream: {told}>" and told in stream._repr_html_()
    assert repr(stream) == f"<Stream, closed: {told}>"
    output = pipe(prompt, **{**call, "generator": generators(0)})
    assert str(output) == "3 chunks (2.1 s): 1 held, 0 trimmed, 0 quarantined"


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_output_knows_its_grid_and_chunks(output_type):
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0))
    prompt = "a red circle moving right over a blue background"
    output = pipe(prompt, num_frames=45, generator=generators(0), output_type=output_type, drift_sensitivity=0.0)
    assert output.grid == (2, 3)
    assert output.chunk_frames == (None if output_type == "latent" else [9, 12, 12, 12])  # 3 latent frames each
    if output_type == "np":
        assert sum(output.chunk_frames) == output.frames.shape[1]
        assert output.filmstrip().shape[2] == 3
    decisions = pipe(prompt, num_frames=9, output_type="latent", return_dict=False)[1]
    assert decisions == [output.decisions[0][:1]]
