"""The world of photographs: licenses, unreadable files, the camera, the prompts; and the measures that know it."""

import re
from dataclasses import replace

import pytest
import torch

from research.natural.latents import load_photographs
from research.photographs.prepare import FOLDER, SOURCES
from research.training import photographs
from research.training.photographs import (
    PHOTOGRAPH_HEIGHT,
    PLACES,
    Camera,
    Scene,
    load_photograph,
    load_places,
    render,
)
from research.training.sizes import SMALL
from research.training.train import halve_files


FREE_LICENSES = {"CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0"}


def license_rows() -> dict[str, list[str]]:
    """The table of the license page: file -> its other cells."""
    lines = (FOLDER / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \w+\.jpg", line)]
    return {name: cells for name, *cells in rows}


def test_every_photograph_has_an_author_and_a_free_license():
    rows = license_rows()
    assert rows.keys() == {path.name for path in FOLDER.iterdir() if path.suffix in (".jpg", ".jpeg", ".png")}
    for name, (_, author, year, license_, original) in rows.items():
        assert author and year.isdigit() and license_ in FREE_LICENSES, name
        assert SOURCES[name.removesuffix(".jpg")] == original
    assert {rows[name][3] for name in PLACES.values()} <= {"CC-BY-4.0", "CC0-1.0"}


def test_copies_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.jpg")) <= 2 * 2**20


def test_an_unreadable_photograph_is_refused_by_name(tmp_path):
    for name in PLACES.values():
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    (tmp_path / "peaks.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"peaks\.jpg cannot be read"):
        load_places(tmp_path)
    (tmp_path / "peaks.jpg").write_bytes((FOLDER / "peaks.jpg").read_bytes()[:5000])  # cut short
    with pytest.raises(ValueError, match=r"peaks\.jpg cannot be read"):
        load_photograph(tmp_path / "peaks.jpg")
    (tmp_path / "peaks.jpg").unlink()
    with pytest.raises(ValueError, match=r"peaks\.jpg cannot be read"):
        load_photograph(tmp_path / "peaks.jpg")


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no photograph"):
        load_photographs(tmp_path)


def still_camera(**changes) -> Camera:
    still = (0.0, 100.0, 0.0)
    return replace(Camera(start=0.0, speed=0.0, sway=still, lift=still, breath=(1.0, 1e9, -torch.pi / 2)), **changes)


def test_a_still_camera_at_zoom_1_shows_the_middle_of_the_photograph():
    scene = Scene("slow", "right", "a sunset")
    width = PHOTOGRAPH_HEIGHT * 384 / 256
    frame = render(scene, still_camera(start=width / 2), 1)[0]
    photograph = load_photograph(FOLDER / "sunset.jpg")
    small = torch.nn.functional.interpolate(photograph[None], (120, 180), mode="bilinear", antialias=True)[0]
    assert (frame - small[:, 12:108, 42:138]).abs().mean() < 0.01


def test_a_pan_moves_the_picture_by_its_speed_and_comes_back_mirrored():
    scene = Scene("fast", "right", "paint brushes")
    camera = still_camera(start=90.0, speed=2.0)
    first, later = render(scene, camera, 1), render(scene, camera, 1, first_frame=5)
    assert torch.allclose(first[..., 10:], later[..., :-10], atol=1e-4)
    around = render(scene, camera, 1, first_frame=180)  # 360 pixels: the photograph and its mirror image
    assert torch.allclose(first, around, atol=1e-4)
    edge = render(scene, still_camera(start=180.0), 1)
    assert torch.allclose(edge, edge.flip(-1), atol=1e-4)


def test_a_video_is_drawn_the_same_whole_or_in_parts():
    generator = torch.Generator().manual_seed(3)
    scene = Scene.sample(generator)
    camera = Camera.sample(scene, generator)
    whole = render(scene, camera, 6, first_frame=1000)
    assert torch.allclose(whole[4:], render(scene, camera, 2, first_frame=1004), atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_a_camera_never_leaves_the_photograph_upwards_or_downwards(seed):
    generator = torch.Generator().manual_seed(seed)
    zoom, _, y = Camera.sample(Scene.sample(generator), generator).path(600)
    assert (y.abs() + photographs.SIZE / zoom / 2).max() <= PHOTOGRAPH_HEIGHT / 2 + 1e-9
    assert zoom.min() >= photographs.ZOOMS[0] - 1e-9 and zoom.max() <= photographs.ZOOMS[1] + 1e-9


@pytest.mark.parametrize("prompt", ["a slow pan right over a lake", "a calm pan left over a sunset", "a slow pan", ""])
def test_other_sentences_are_refused(prompt):
    with pytest.raises(ValueError, match="is not a sentence of this world"):
        photographs.parse(prompt)


def test_half_files_load_in_float32_with_the_rounded_values(tmp_path):
    from research.training.transformer import make_transformer

    torch.manual_seed(0)
    transformer = make_transformer(SMALL)
    transformer.save_pretrained(tmp_path / "whole")
    transformer.save_pretrained(tmp_path / "half")
    halve_files(tmp_path / "half")
    whole, half = (next((tmp_path / name).glob("*.safetensors")).stat().st_size for name in ("whole", "half"))
    assert half < 0.55 * whole
    loaded = type(transformer).from_pretrained(tmp_path / "half")
    for (name, ours), theirs in zip(transformer.state_dict().items(), loaded.state_dict().values()):
        assert theirs.dtype == torch.float32 and torch.equal(theirs, ours.half().float()), name
