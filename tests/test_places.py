"""Measures of the world of photographs: they find where a frame was taken, and tell a cast from another photograph."""

import numpy as np
import pytest
import torch

from research.evaluation.place_report import format_interval, measure_true
from research.evaluation.places import load_atlases, measure_places
from research.training.autoencoder import make_autoencoder
from research.training.photographs import SIZES, Camera, Scene, render


SCENES = [Scene("fast", "right", "paint brushes"), Scene("slow", "left", "rocky peaks")]


def film(scene: Scene, seed: int, time: int = 50) -> tuple[np.ndarray, float, float]:
    """A frame of a true video, (1, H, W, 3), with its zoom and x."""
    camera = Camera.sample(scene, torch.Generator().manual_seed(seed))
    zoom, x, _ = camera.path(1, time)
    return render(scene, camera, 1, time).permute(0, 2, 3, 1).numpy(), zoom.item(), x.item()


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.place)
def test_a_true_frame_is_found_where_it_was_taken(scene):
    frame, zoom, x = film(scene, seed=1)
    (row,) = measure_places(frame, scene.prompt)
    assert row["zoom"] == pytest.approx(zoom, abs=0.02)
    assert abs((row["x"] - x + 180) % 360 - 180) < 1
    assert row["structure_error"] < 0.01 and row["color_error"] < 1 and row["other_share"] == 0


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.place)
def test_a_cast_is_an_error_of_color_and_no_other_photograph(scene):
    frame, _, x = film(scene, seed=2)
    cast = (0.85 * frame + 0.08 * np.array([1, 0, 0.5])).astype(np.float32)
    (row,) = measure_places(cast, scene.prompt)
    assert abs((row["x"] - x + 180) % 360 - 180) < 2
    assert row["color_error"] > 5 and row["structure_error"] < 0.05 and row["other_share"] <= 0.12


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.place)
def test_another_photograph_shows_in_every_measure_and_half_of_one_in_between(scene):
    frame, _, _ = film(scene, seed=3)
    other, _, _ = film(Scene(scene.pace, scene.direction, "a dandelion field"), seed=3)
    half = frame.copy()
    half[:, :, 48:] = other[:, :, 48:]
    own, mixed, wrong = (measure_places(each, scene.prompt)[0] for each in (frame, half, other))
    for name in ("structure_error", "color_error", "feature_error", "other_share"):
        assert own[name] < mixed[name] < wrong[name], name
    assert 0.2 <= mixed["other_share"] <= 0.7 and wrong["other_share"] > 0.6


def test_atlases_cover_the_whole_ring_and_all_zooms():
    for atlas in load_atlases().values():
        zoom, x, share = atlas.cameras.T
        assert (zoom.min(), zoom.max()) == (1.0, 1.3)
        assert x.min() == 0 and 354 <= x.max() < 360
        assert (share.min(), share.max()) == (-1, 1)
        assert atlas.descriptors.shape == (len(atlas.cameras), 12, 12, 3)


def test_the_floor_is_measured_through_the_autoencoder(tmp_path):
    torch.manual_seed(0)
    make_autoencoder(SIZES).save_pretrained(tmp_path / "vae")
    table = measure_true({5: SCENES[0].prompt, 6: SCENES[1].prompt}, tmp_path, [0, 2], per_chunk=3)
    assert table[["seed", "chunk"]].to_numpy().tolist() == [[5, 0], [5, 2], [6, 0], [6, 2]]
    assert (table["color_error"] > 1).all()  # this autoencoder is not trained


def test_an_interval_contains_its_mean():
    assert format_interval(np.array([0.0, 1.0, 1.0, 2.0])).startswith("1.000 [")
    assert format_interval(np.array([0.5])) == "0.500"
