"""Reading pictures and videos: every common mode and format, and only formats that hold their own frames."""

import json
import os
import subprocess
import sys
import time

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from tokentrim.tokentrim_frames.pictures import as_rgb, open_picture
from tokentrim.tools.cli import main
from tokentrim.tools.frames import Limits, find_videos, list_pictures, read_frames


FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
RAMP = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
SOURCE = ["-f", "lavfi", "-i", "testsrc=size=96x64:rate=16:duration=3"]


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-y", "-v", "error", *map(str, arguments)], check=True)


def make_video(path, *arguments):
    ffmpeg(*SOURCE, *arguments, path)
    return path


def rgb(picture) -> np.ndarray:
    return np.asarray(as_rgb(picture))


def assert_is_ramp(frame, tolerance=1):
    assert frame.shape == (64, 96, 3) and frame.dtype == np.uint8
    assert np.abs(frame.astype(int) - RAMP[..., None]).max() <= tolerance


# Modes of pictures

DEEP = RAMP.astype(np.uint16) * 257
GREY = {
    "8 bits": lambda: Image.fromarray(RAMP),
    "16 bits": lambda: Image.fromarray(DEEP),
    "16 bits, big-endian": lambda: Image.frombytes("I;16B", (96, 64), DEEP.astype(">u2").tobytes()),
    "floats": lambda: Image.fromarray(RAMP.astype(np.float32) / 255),
    "palette": lambda: Image.fromarray(RAMP).quantize(256),
    "opaque": lambda: Image.fromarray(RAMP).convert("RGBA"),
    "opaque grey": lambda: Image.fromarray(RAMP).convert("LA"),
    "CMYK": lambda: Image.fromarray(RAMP).convert("RGB").convert("CMYK"),
}


@pytest.mark.parametrize("form", GREY)
def test_every_mode_keeps_its_levels(form):
    assert_is_ramp(rgb(GREY[form]()))


@pytest.mark.parametrize("form", [form for form in GREY if form not in ("16 bits, big-endian", "floats", "CMYK")])
def test_files_of_every_mode_keep_their_levels(form, tmp_path):
    for number in range(2):
        GREY[form]().save(tmp_path / f"{number}.png")
    for frame in read_frames(tmp_path):
        assert_is_ramp(frame)


def test_transparent_pixels_become_white():
    """Whatever the hidden color, and for every kind of transparency."""
    color = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    color.putpixel((0, 0), (7, 7, 7, 0))
    expected = [[[255, 255, 255], [200, 0, 0]]]
    assert rgb(color).tolist() == expected
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([7, 7, 7, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 0
    assert rgb(palette).tolist() == expected
    keyed = color.convert("RGB")
    keyed.info["transparency"] = (7, 7, 7)
    assert rgb(keyed).tolist() == expected
    half = rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert half.tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_follow_their_exif_orientation(orientation, tmp_path):
    from PIL import ImageOps

    picture = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "x.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    assert expected.size == ((4, 6) if orientation < 5 else (6, 4))
    assert np.array_equal(np.asarray(open_picture(tmp_path / "x.png")), np.asarray(expected))


@pytest.mark.parametrize(
    "levels, message",
    [
        (RAMP.astype(np.float32), r"must be in \[0, 1\], but is in \[0, 255\]"),
        (np.full((2, 2), np.nan, np.float32), "must be in"),
        (RAMP.astype(np.int32), "does not say which level is white"),
    ],
)
def test_levels_without_a_known_white_raise(levels, message):
    with pytest.raises(ValueError, match=message):
        as_rgb(Image.fromarray(levels))


@pytest.mark.parametrize("name, form", [("x.png", "BMP"), ("x.jpg", "TIFF"), ("x.webp", "GIF"), ("x.png", "PPM")])
def test_pictures_in_other_formats_raise(name, form, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / name, format=form)
    with pytest.raises(ValueError, match=f"{name} is no complete picture in PNG, JPEG, WEBP format"):
        open_picture(tmp_path / name)


def test_pictures_with_too_many_pixels_raise_before_decoding(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "0.png")  # Pillow itself would refuse it
    Image.new("1", (8192, 8192)).save(tmp_path / "1.png")
    for name in ("0.png", "1.png"):
        with pytest.raises(ValueError, match=f"{name} .*pixels"):
            open_picture(tmp_path / name)


def test_damaged_pictures_are_named(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for form in ("png", "jpeg", "webp"):
        picture.save(tmp_path / f"x.{form}")
        whole = (tmp_path / f"x.{form}").read_bytes()
        for size in (0, 1, 10, 40, len(whole) // 2):
            (tmp_path / f"x.{form}").write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"x.{form} is "):
                open_picture(tmp_path / f"x.{form}")


# Folders


def make_pictures(folder, count=24):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(np.roll(RAMP, number, axis=1)).save(folder / f"{number}.png")
    return folder


def test_a_folder_with_videos_is_a_folder_of_videos(tmp_path):
    make_video(tmp_path / "a.mp4"), make_video(tmp_path / "b.MP4")
    Image.new("RGB", (4, 4)).save(tmp_path / "poster.jpg")
    make_pictures(tmp_path / "c")
    (tmp_path / "d.mp4").mkdir()
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    make_pictures(tmp_path / ".thumbnails")
    assert [path.name for path in find_videos([tmp_path])] == ["a.mp4", "b.MP4", "c"]


def test_a_folder_of_folders_of_pictures_may_hold_a_picture(tmp_path):
    make_pictures(tmp_path / "a"), make_pictures(tmp_path / "b")
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.png")
    assert [path.name for path in find_videos([tmp_path])] == ["a", "b"]


def test_a_plot_does_not_break_the_next_run(tmp_path):
    """Neither inside a folder of pictures nor beside such folders."""
    pictures = make_pictures(tmp_path / "pictures")
    for folder in (pictures, tmp_path):
        for _ in range(2):
            assert main(["drift", str(folder), "--plot", str(folder / "drift.png")]) == 0
    assert len(list_pictures(pictures)) == 24 and (pictures / "drift.png").exists()


def test_hidden_system_files_are_ignored(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    (pictures / "._0.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (pictures / name).write_bytes(b"x")
    (pictures / "folder.png").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._0.png").write_bytes(b"x")
    assert find_videos([tmp_path]) == [pictures] and len(list(read_frames(pictures))) == 24


def test_path_that_is_neither_file_nor_folder_raises(tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(ValueError, match="x.mp4 is neither a file nor a folder"):
        find_videos([tmp_path / "x.mp4"])


# Videos


@pytest.mark.parametrize("name", ["x.mp4", "x.mov", "x.mkv", "x.webm", "x.avi", "x.gif", "x.webp", "-x %d 'y' ü.mp4"])
def test_every_video_format_decodes(name, tmp_path, caplog):
    path = make_video(tmp_path / name, *(["-c:v", "libwebp_anim"] if name == "x.webp" else []))
    frames = list(read_frames(path))
    assert len(frames) == 48 and all(frame.shape == (64, 96, 3) for frame in frames)
    assert caplog.text == ""


def test_videos_follow_their_rotation_metadata(tmp_path):
    make_video(tmp_path / "x.mp4")
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "x.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert next(read_frames(tmp_path / "turned.mp4")).shape == (96, 64, 3)


LONG_SOUND = ["-f", "lavfi", "-i", "sine=d=20", "-map", "0:v", "-map", "1:a"]
SPARSE = ["-vf", "select='lt(t,1)+not(mod(n,15))'", "-fps_mode", "vfr"]


@pytest.mark.parametrize(
    "name, arguments",
    [("x.mp4", LONG_SOUND), ("x.mkv", LONG_SOUND), ("x.mp4", SPARSE), ("x.mkv", SPARSE), ("x.gif", SPARSE)],
)
def test_complete_video_is_not_reported_as_incomplete(name, arguments, tmp_path, caplog):
    """Neither with a longer sound track nor with a variable frame rate."""
    frames = list(read_frames(make_video(tmp_path / name, *arguments)))
    assert len(frames) == (48 if arguments is LONG_SOUND else 18) and caplog.text == ""


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("x.mp4", ["-movflags", "+faststart"]),
        ("x.mp4", ["-movflags", "+faststart", *LONG_SOUND]),
        ("x.mp4", ["-movflags", "+frag_keyframe+empty_moov", "-g", "8"]),
        ("x.mov", ["-movflags", "+faststart"]),
        ("x.mkv", []),
        ("x.webm", []),
        ("x.mkv", LONG_SOUND),
        ("x.avi", []),
        ("x.avi", LONG_SOUND),
    ],
)
def test_truncated_video_is_reported_as_incomplete(name, arguments, tmp_path, caplog):
    source = ["-f", "lavfi", "-i", "testsrc=size=96x64:rate=16:duration=3,noise=alls=60:allf=t"]
    sound = [each for each in arguments if each in LONG_SOUND]
    ffmpeg(*source, *(sound or []), *(each for each in arguments if each not in sound), "-g", "4", tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    count = len(list(read_frames(tmp_path / name)))
    assert count < 48 and f"{name} ends after {count}" in caplog.text and "is the file complete?" in caplog.text


# Files that name other files

PLAYLISTS = {
    "DASH": """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
        profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT3S" minBufferTime="PT1S"><Period>
        <AdaptationSet contentType="video"><Representation id="0" mimeType="video/mp4" width="96" height="64"
        codecs="avc1.64000a" frameRate="16" bandwidth="100000"><BaseURL>{}</BaseURL></Representation></AdaptationSet>
        </Period></MPD>""",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\n{}\n#EXT-X-ENDLIST\n",
    "SDP": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("form", PLAYLISTS)
@pytest.mark.parametrize("ending", ["mp4", "mkv", "gif"])
def test_playlist_raises(form, ending, tmp_path, capsys):
    private = make_video(tmp_path / "private.mp4", "-movflags", "+frag_keyframe+empty_moov")
    (tmp_path / f"x.{ending}").write_text(PLAYLISTS[form].format(private))
    start = time.monotonic()
    assert main(["drift", str(tmp_path / f"x.{ending}")]) == 1
    assert f"x.{ending} cannot be decoded as a video" in capsys.readouterr().err and time.monotonic() - start < 10


def test_a_name_is_never_a_pattern_or_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures")
    for name in ("pictures/%d.mp4", "concat:a.mp4", "http:x.mp4"):
        path = tmp_path / name
        path.write_text("no video")
        with pytest.raises(ValueError, match="cannot be decoded as a video"):
            list(read_frames(path))


# Limits


def test_frames_with_too_many_pixels_raise(tmp_path):
    """Within the memory of a small video."""
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "color=black:size=8192x8192:rate=25:duration=0.4",
        "-preset",
        "ultrafast",
        tmp_path / "x.mp4",
    )
    script = """
import resource, sys
from pathlib import Path
from tokentrim.tools.frames import read_frames
try:
    list(read_frames(Path(sys.argv[1])))
except ValueError as error:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, error)
"""
    (tmp_path / "tokentrim").symlink_to(ROOT)
    command = [sys.executable, "-c", script, str(tmp_path / "x.mp4")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    megabytes, message = done.stdout.split(" ", 1)
    assert int(megabytes) < 300 and "more than 35.4 million pixels, the limit here" in message


def test_limits_of_frames_pixels_and_time(tmp_path):
    path, pictures = make_video(tmp_path / "x.mp4"), make_pictures(tmp_path / "pictures")
    for each, count in ((path, 48), (pictures, 24)):
        assert len(list(read_frames(each, Limits(frames=count)))) == count
        with pytest.raises(ValueError, match=f"has more than {count - 1} frames, the limit here"):
            list(read_frames(each, Limits(frames=count - 1)))
        with pytest.raises(ValueError, match="pixels"):
            list(read_frames(each, Limits(pixels=96 * 64 - 1)))
        with pytest.raises(ValueError, match="was not read in 0.5 s, the limit here"):
            for _ in read_frames(each, Limits(seconds=0.5)):
                time.sleep(0.6)


def list_decoders():
    """The command lines of this process's children."""
    pids = subprocess.run(["pgrep", "-P", str(os.getpid()), "ffmpeg"], capture_output=True, text=True).stdout.split()
    return pids


def test_decoder_ends_with_its_reader(tmp_path):
    path = make_video(tmp_path / "x.mp4", "-vf", "scale=1920:1280")
    frames = read_frames(path)
    next(frames)
    assert list_decoders()
    frames.close()
    assert not list_decoders()
    with pytest.raises(ValueError, match="more than 1 frames"):
        list(read_frames(path, Limits(frames=1)))
    assert not list_decoders()


def test_dollar_sign_in_a_name_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "x.mp4")
    folder = tmp_path / "a $x_{ $^_$"
    for name in ("a $^_$ b.mp4", r"\frac$1$.mp4", "$$.mp4"):
        make_video(tmp_path / name)
        assert main(["drift", name, "--plot", "x.png"]) == 0
    folder.mkdir()
    for name in ("_a.mp4", "b.mp4"):
        (folder / name).symlink_to(tmp_path / "x.mp4")
    (tmp_path / "_other").mkdir()
    (tmp_path / "_other" / "c.mp4").symlink_to(tmp_path / "x.mp4")
    assert main(["drift", str(folder), "_other", "--plot", "y.png", "--json", "y.json"]) == 0
    assert len(json.loads((tmp_path / "y.json").read_text())["videos"]) == 3
