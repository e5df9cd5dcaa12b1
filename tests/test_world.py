"""The shipped world: its grammar, its measures, its checkpoint, its configs and its demo."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import held_tokens
from conftest import ROOT
from PIL import Image
from skimage.color import rgb2lab

from research.evaluation.experiment import sample_prompts
from research.evaluation.measures import difference, name_shape, summarize_drift, track_colors
from research.evaluation.report import bootstrap
from research.evaluation.rollouts import CHECKPOINT, METHODS, load_pipeline, run_method
from research.training.world import COLORS, Appearance, Scene, centers, parse, render
from tokentrim.tokentrim_policies.registry import make_method


def color_name(lab: np.ndarray) -> str:
    named = rgb2lab(np.array([list(COLORS.values())]))[0]
    return list(COLORS)[int(np.argmin(difference(named, lab)))]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_parse_inverts_prompt():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scene = Scene.sample(generator)
        assert parse(scene.prompt) == scene
    with pytest.raises(ValueError, match="a plaid circle"):
        parse("a plaid circle moving right over a blue background")


def test_a_video_is_drawn_the_same_whole_or_in_parts():
    generator = torch.Generator().manual_seed(3)
    scene = Scene("red", "circle", "left", "blue", "turn", "green")
    appearance = Appearance.sample(scene, generator)
    whole = render(scene, appearance, 30)
    assert torch.equal(whole[12:], render(scene, appearance, 18, first_frame=12))
    assert (whole[0] - whole[-1]).abs().mean() > 0.1  # the background turned


@pytest.mark.parametrize("seed", range(6))
def test_measures_see_what_was_rendered(seed):
    prompt = sample_prompts([seed])[0]
    appearance = Appearance.sample(parse(prompt), torch.Generator().manual_seed(seed))
    frames = render(parse(prompt), appearance, 30).permute(0, 2, 3, 1).numpy()
    colors, drift = track_colors(frames, prompt, 3), summarize_drift(frames, prompt, 3)
    assert color_name(colors.object[0]) == parse(prompt).color
    assert color_name(colors.background[0]) == parse(prompt).background
    assert all(name_shape(mask) == parse(prompt).shape for mask in colors.mask)
    assert drift["background_drift"] < 1.5 and drift["object_drift"] < 1.5 and drift["object_lost"] == 0
    moved = centers(appearance, 30).diff(dim=0).norm(dim=1).mean().item()
    assert drift["motion"] == pytest.approx(moved, abs=0.05)
    faded = frames * np.linspace(1, 0.5, 30)[:, None, None, None]
    assert summarize_drift(faded, prompt, 3)["background_drift"] > 5


def test_bootstrap_interval_holds_the_mean_and_narrows():
    values = np.random.default_rng(1).normal(1.0, 1.0, 400)
    low, high = bootstrap(values)
    assert low < values.mean() < high and high - low < np.subtract(*bootstrap(values[:25])[::-1])


def test_checkpoint_is_small_and_holds_no_pickle():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_first_chunk_shows_what_the_prompt_names(pipe):
    """Colour of object and background, and shape, in at least nine of ten videos."""
    seeds = list(range(20))
    prompts = sample_prompts(seeds)
    run = run_method(pipe, "plain", prompts, seeds, num_chunks=1)
    right = 0
    for prompt, frames in zip(prompts, run.frames):
        colors, scene = track_colors(frames, prompt, 3), parse(prompt)
        named = color_name(colors.object[0]), color_name(colors.background[0]), name_shape(colors.mask[1])
        right += named == (scene.color, scene.background, scene.shape)
    assert right >= 18


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.json")))
def test_configs_are_arguments_of_the_call(pipe, name):
    config = json.loads((ROOT / "configs" / name).read_text())
    output = pipe("a red circle moving right over a blue background", **{**config, "num_frames": 6})
    assert output.frames.shape == (1, 6, 64, 64, 3) and output.frames.std() > 0.05
    json.dumps(output.decisions, allow_nan=False)


@pytest.mark.parametrize("name", ["paper", "tokentrim_plus"])
def test_config_of_a_method_spells_out_the_named_one(name):
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    named, spelled_out = (make_method(method, {}) for method in (name, config["method"]))
    for ours, theirs in ((named.policies, spelled_out.policies), (named.hooks, spelled_out.hooks)):
        assert [(type(part), vars(part)) for part in ours] == [(type(part), vars(part)) for part in theirs]


@pytest.mark.parametrize("world", ["tiny-world", "tiny-world-self-forced", "travelling-world"])
def test_shipped_worlds_name_the_method_that_was_measured_on_them(world):
    index = json.loads((ROOT / "checkpoints" / world / "model_index.json").read_text())
    assert index["method"] == "tokentrim_plus"


def test_a_prompt_is_enough_and_the_checkpoint_sets_the_rollout(pipe):
    prompt = "a red circle moving right over a blue background"
    world = json.loads((ROOT / "configs" / "tiny_world.json").read_text())
    bare, spelled_out = (
        pipe(prompt, generator=torch.manual_seed(0), output_type="latent", **{**config, "num_frames": 27}).frames
        for config in ({}, world)
    )
    assert torch.equal(bare, spelled_out)


def test_paired_methods_differ_only_by_what_they_do(pipe):
    seeds = [5, 6]
    runs = {method: run_method(pipe, method, sample_prompts(seeds), seeds, num_chunks=8) for method in METHODS}
    for video in range(2):
        triggers = [each["chunk"] for each in runs["tokentrim"].decisions[video] if each["trim"]]
        for method, first in (("tokentrim", min(triggers, default=8)), ("tokentrim_plus", 2)):
            same, plain = 3 * first, runs["plain"].frames[video]
            assert np.allclose(plain[:same], runs[method].frames[video][:same], atol=1e-4)
    assert not np.allclose(runs["plain"].frames[:, 6:], runs["tokentrim_plus"].frames[:, 6:], atol=1e-2)


@pytest.mark.slow
def test_demo_writes_what_it_promises(tmp_path):
    command = [sys.executable, "-m", "research.evaluation.demo", "--chunks", "6", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    promised = "decisions.json drift.png filmstrip.png plain.mp4 side_by_side.mp4 side_by_side.webp tokentrim.mp4 "
    promised += "tokentrim_plus.mp4"
    assert sorted(path.name for path in tmp_path.iterdir()) == promised.split()
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
    decisions = json.loads((tmp_path / "decisions.json").read_text())
    assert [len(method_decisions) for method_decisions in decisions.values()] == [6, 6, 6]
    lines = result.stdout.splitlines()
    for method in METHODS:
        assert any(
            re.match(rf"{method} +colors of the top 30% end +\d+\.\d away from the start; ", line) for line in lines
        )
    assert any(line.endswith("held 4 of 6 chunks") for line in lines)  # neither the first, nor the last
    with Image.open(tmp_path / "side_by_side.webp") as picture:
        assert picture.n_frames == 6 and picture.width >= 3 * 192


def test_rolling_forcing_trims_on_the_world_and_keeps_the_sink(pipe):
    """It was not trained for it."""
    seeds, sinks = [0, 1, 2], []

    def on_chunk(index, latents, decisions):
        cache = pipe.transformer.blocks[0].attn1.processor.cache
        sinks.append([held_tokens(cache, video)[: 3 * 64] for video in range(3)])

    output = pipe(
        sample_prompts(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        method="tokentrim",
        rollout="rolling_forcing",
        num_inference_steps=4,
        num_frames=36,
        output_type="latent",
        on_chunk=on_chunk,
    )
    assert any(each["trim"] for decisions in output.decisions for each in decisions)
    assert sinks == [[[(frame, token) for frame in range(3) for token in range(64)]] * 3] * 12
