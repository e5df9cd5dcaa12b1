"""Every shipped checkpoint is small, has no pickles, has a card, and rolls out with its own settings."""

import json

import pytest
import torch
from conftest import ROOT

from research.evaluation.rollouts import PROMPTS, load_pipeline
from research.training.train import generate


STEPS = {"tiny-world": 8, "travelling-world": 8, "tiny-world-self-forced": 4, "photographs": 8}
CHECKPOINTS = sorted(path for path in (ROOT / "checkpoints").iterdir() if path.is_dir())


def test_demo_offers_every_checkpoint():
    assert sorted(PROMPTS) == [path.name for path in CHECKPOINTS]


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_checkpoint_is_small_described_and_without_pickles(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert all(word in (folder / "README.md").read_text() for word in ("license", "**Training.**", "**Limits.**"))


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_checkpoint_rolls_out_past_its_window(folder):
    pipe = load_pipeline(folder)
    num_frames = pipe.config.window_size + 2 * pipe.config.num_frames_per_chunk
    frames = generate(pipe, [PROMPTS[folder.name]], num_frames)
    assert frames.shape == (1, num_frames, 3, pipe.config.height, pipe.config.width) and torch.isfinite(frames).all()
    assert frames.std() > 0.05 and frames.diff(dim=1).abs().mean() > 1e-3  # a picture, and it moves


@pytest.mark.parametrize("world, steps", STEPS.items())
def test_worlds_keep_their_number_of_steps(world, steps):
    index = json.loads((ROOT / "checkpoints" / world / "model_index.json").read_text())
    assert index["num_inference_steps"] == steps and index["fps"] == 12
    assert index["method"] == ("plain" if world == "photographs" else "tokentrim_plus")  # what was measured on it
