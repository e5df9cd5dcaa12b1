"""The two-sided measure: near zero on true videos, ordered on drifts of known size, and bad for frozen videos."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy.ndimage import gaussian_filter

from research.evaluation import two_sided
from research.evaluation.experiment import Experiment, part, sample_prompts
from research.evaluation.fidelity import LOOKS, Infidelity, Looks, energy_distance, interval, life, pair_distances
from research.evaluation.kinds_of_drift import describe
from research.evaluation.two_sided import (
    FLOOR,
    HIDDEN_SEEDS,
    load_videos,
    measure,
    motions,
    render_true,
    report,
    skies,
)
from research.evaluation.worlds import WORLDS, render_chunks
from research.training import travelling, world


NUM_VIDEOS, NUM_CHUNKS = 8, 5


def true_videos(of, hidden_seed: int) -> np.ndarray:
    prompts = sample_prompts(list(range(NUM_VIDEOS)), of=of)
    chunks = [render_chunks(of, prompt, hidden_seed + n, NUM_CHUNKS, 3) for n, prompt in enumerate(prompts)]
    return np.stack(chunks)[:, :, 0]


@pytest.fixture(scope="module", params=[world, travelling], ids=["tiny", "travelling"])
def true(request):
    """Two sets of true videos of the same prompts, uint8 (videos, chunks, H, W, 3)."""
    return true_videos(request.param, 1000), true_videos(request.param, 2000)


def as_uint8(frames):
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def drifted(videos: np.ndarray, change) -> np.ndarray:
    """Apply `change(frame, share)` to each frame in [0, 1], with its share of the time."""
    chunks = videos.shape[1]
    return np.stack([[as_uint8(change(frame / 255, n / chunks)) for n, frame in enumerate(video)] for video in videos])


DRIFTS = {
    "darker": lambda frame, share, size: frame * (1 - size * share),
    "blurred": lambda frame, share, size: gaussian_filter(frame, (4 * size * share, 4 * size * share, 0)),
    "grey": lambda frame, share, size: frame + size * share * (frame.mean(axis=-1, keepdims=True) - frame),
}


def measured(true, videos, kind):
    look = LOOKS[kind]
    scale = look(true)
    reference, looks = Looks.of(scale, scale), Looks.of(look(videos), scale)
    return Infidelity(looks, reference), life(looks, reference)


def test_renders_match_their_worlds():
    """The middle frame of a chunk and the next one, from the same hidden draw."""
    for of, prompt in (
        (world, "a red circle moving right over a blue background"),
        (travelling, "a fast journey right over hills by noon"),
    ):
        chunks = render_chunks(of, prompt, 5, 4, 3)
        assert chunks.shape == (4, 2, of.SIZE, of.SIZE, 3) and chunks.dtype == np.uint8
        hidden = of.HIDDEN.sample(of.parse(prompt), torch.Generator().manual_seed(5))
        whole = of.render(of.parse(prompt), hidden, 12).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(chunks[:, 0], as_uint8(whole[1::3]))
        np.testing.assert_array_equal(chunks[:, 1], as_uint8(whole[2::3]))
        assert not np.array_equal(chunks, render_chunks(of, prompt, 6, 4, 3))


@pytest.mark.parametrize("kind", LOOKS)
def test_true_videos_are_near_zero_and_live(true, kind):
    infidelity, of_life = measured(true[0], true[1], kind)
    assert np.abs(infidelity.over_time()).max() < 0.2
    _, low, high = interval(infidelity.growth, NUM_VIDEOS, 200)
    assert low < 0 < high
    if kind == "features":  # colours of a tiny world stay
        assert 0.7 < of_life < 1.4


@pytest.mark.parametrize(("kind", "name"), [("features", "blurred"), ("colors", "darker"), ("colors", "grey")])
def test_infidelity_grows_with_the_drift(true, kind, name):
    drifts = [drifted(true[1], partial(DRIFTS[name], size=size)) for size in (0, 0.4, 0.9)]
    growths = [measured(true[0], drift, kind)[0].growth() for drift in drifts]
    assert growths == sorted(growths) and growths[2] > growths[0] + 0.01


def test_life_distinguishes_frozen_from_drifting(true):
    frozen = np.repeat(true[1][:, :1], NUM_CHUNKS, axis=1)
    assert measured(true[0], frozen, "features")[1] == 0
    once = measured(true[0], true[1], "features")[1]
    assert measured(true[0], drifted(true[1], partial(DRIFTS["darker"], size=0.9)), "features")[1] > 1.1 * once


def test_energy_distance_is_unbiased():
    """Against the formula written out over all pairs of different prompts; near zero for equal distributions."""
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 6, 3, 2))
    matrices = pair_distances(ours, theirs), pair_distances(ours, ours), pair_distances(theirs, theirs)

    def mean_over(first, second):
        return np.mean(
            [
                np.linalg.norm(a - b)
                for v, first_video in enumerate(first)
                for w, second_video in enumerate(second)
                if v != w
                for a in first_video
                for b in second_video
            ]
        )

    expected = 2 * mean_over(ours, theirs) - mean_over(ours, ours) - mean_over(theirs, theirs)
    assert energy_distance(*matrices, np.arange(6)) == pytest.approx(expected)
    draws = generator.normal(size=(300, 2, 12, 1, 2))
    distances = [
        energy_distance(
            pair_distances(*each), pair_distances(each[0], each[0]), pair_distances(each[1], each[1]), all_
        )
        for each in draws
        for all_ in [np.arange(12)]
    ]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / np.sqrt(len(distances))


def test_two_sided_prints_the_table_of_an_experiment(tmp_path):
    """From files as `research.evaluation.run` writes them, without a model: true videos as plain, darker ones as
    another method."""
    config = tmp_path / "small.yaml"
    config.write_text(
        "checkpoint: checkpoints/travelling-world\nfirst_seed: 7\nnum_seeds: 6\nnum_chunks: 4\nbatch_size: 3\n"
        "methods:\n  plain: {method: plain}\n  darker: {method: tokentrim_plus}\n"
    )
    experiment = Experiment.load(config)
    assert experiment.world is WORLDS["travelling-world"]
    (tmp_path / "parts").mkdir()
    for method, seeds in experiment.jobs():
        chunks = [
            render_chunks(travelling, prompt, seed + 3_000_000, 4, 3)
            for seed, prompt in zip(seeds, experiment.prompts(seeds))
        ]
        frames = np.stack(chunks)[:, :, 0]
        if method == "darker":
            frames = drifted(frames, partial(DRIFTS["darker"], size=0.8))
        path = part(tmp_path, method, seeds)
        np.savez_compressed(path.with_suffix(".npz"), frames=frames)
        rows = [{"method": method, "seed": seed, "chunk": chunk, "flow": 1.0} for seed in seeds for chunk in range(4)]
        pd.DataFrame(rows).to_csv(path, index=False)
    true, again = (render_true(experiment, hidden_seed) for hidden_seed in HIDDEN_SEEDS)
    videos = load_videos(experiment, tmp_path) | {FLOOR: again[:, :, 0]}
    results = measure(videos, true[:, :, 0])
    assert list(results) == list(LOOKS)
    for methods in results.values():
        assert list(methods) == ["plain", "darker", FLOOR]
        assert methods["plain"]["share"] == (1, 1, 1)
        assert methods["darker"]["over_time"][-1] > methods["plain"]["over_time"][-1]
    motion = motions(experiment, tmp_path, np.stack([render_chunks(travelling, experiment.prompts([7])[0], 7, 4, 3)]))
    assert motion["plain"] == motion["darker"] > 0
    sky = skies(experiment, videos)
    assert max(sky["plain"][0], sky[FLOOR][0]) < 0.5 < 2 < sky["darker"][0]
    text = report(experiment, json.loads(json.dumps(results)), motion, sky)
    assert text.count("\n| ") == 5 and "| darker | " in text


def test_two_sided_takes_a_subset_of_methods(monkeypatch, capsys):
    config = str(ROOT / "research" / "evaluation" / "configs" / "plus.yaml")
    monkeypatch.setattr("sys.argv", ["two_sided", "--config", config, "--methods", "plain", "best"])
    with pytest.raises(SystemExit):
        two_sided.main()
    assert "unknown --methods best; there are plain, tokentrim_plus" in capsys.readouterr().err


def test_experiments_know_their_world(tmp_path):
    config = tmp_path / "x.yaml"
    for settings, message in (
        (
            "checkpoint: checkpoints/travelling-world\nscenes: [turn]",
            "`scenes` and `defects` work with the tiny world only",
        ),
        ("checkpoint: nowhere", "`checkpoint` must be a pipeline's folder"),
    ):
        config.write_text(f"methods: {{plain: {{method: plain}}}}\n{settings}\n")
        with pytest.raises(ValueError, match=message):
            Experiment.load(config)
    assert (ROOT / "checkpoints" / "travelling-world").is_dir()


def test_kinds_of_drift_are_distinguished():
    """Videos that keep walking, each in its own direction, and videos that run to one color and stay."""
    generator = np.random.default_rng(0)
    start, time = generator.uniform(20, 80, size=(40, 1, 3)), np.linspace(0, 1, 61)[None, :, None]
    ways = generator.normal(size=(40, 1, 3))
    walk, run = (
        describe(start + 30 * time * ways / np.linalg.norm(ways, axis=-1, keepdims=True)),
        describe(start + (50 - start) * np.minimum(1, 3 * time) + 0.1 * time * ways),
    )
    assert walk["after 20"] == pytest.approx(10) and walk["at the end"] == pytest.approx(30)
    assert walk["second half over first"] == pytest.approx(1) and walk["cosine of the halves"] == pytest.approx(1)
    assert run["second half over first"] < 0.05
    assert run["distance between videos, end over start"] < 0.1 < 0.9 < walk["distance between videos, end over start"]
    assert walk["common share"] < 2 * walk["if at random"]
    same = describe(start + 30 * time * np.array([1.0, 0, -1]))
    assert same["common share"] == pytest.approx(1) and same["mean change L*, a*, b*"] == "+30.0 +0.0 -30.0"
