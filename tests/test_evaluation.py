"""The measuring code: its checker on rendered truth, experiments, controls, defects and arithmetic."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT

from research.evaluation.controls import OTHER_POLICIES, correct_afterwards, correct_in_pixels
from research.evaluation.defects import DEFECTS, Painted, paint_chunk
from research.evaluation.experiment import Experiment, part, sample_prompts
from research.evaluation.identity import Appearance
from research.evaluation.measures import frame_look, measure_chunks, track_colors
from research.evaluation.report import area_under_curve, paired, releases, summary, video_table, write_report
from research.evaluation.rollouts import load_pipeline
from research.evaluation.signals import SIGNALS
from research.evaluation.worker import run_job
from research.training.world import Appearance as Drawn
from research.training.world import parse, render
from tokentrim.tokentrim_policies.matching import MatchDistribution


TRIM = {"drift_sensitivity": 0.0, "warmup_chunks": 1}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rendered(seed: int, num_frames: int = 30) -> tuple[str, np.ndarray]:
    prompt = sample_prompts([seed])[0]
    drawn = Drawn.sample(parse(prompt), torch.Generator().manual_seed(seed))
    return prompt, render(parse(prompt), drawn, num_frames).permute(0, 2, 3, 1).numpy()


def first_look(seed: int) -> tuple[Appearance, np.ndarray]:
    prompt, frames = rendered(seed)
    return Appearance.of(frames[:3], track_colors(frames[:3], prompt, 3).mask), frames


# The checker, on rendered truth


@pytest.mark.parametrize("seed", range(8))
def test_layers_compose_to_their_frame(seed):
    appearance, frames = first_look(seed)
    np.testing.assert_allclose(appearance.render((0, 0)), frames[1], atol=1e-6)
    moved = appearance.render((-3.5, 2.0))
    offset, error = appearance.place(moved)
    assert offset == (-3.5, 2.0) and error < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_identity_error_of_rendered_clips_is_small(seed):
    """Without drift, only edges between two pixels remain."""
    prompt, frames = rendered(seed)
    rows = measure_chunks(frames, prompt, 3)
    assert max(row["identity_error"] for row in rows) < 0.03
    assert all(row["present"] and row["shape_right"] for row in rows)
    assert max(row["background_error"] for row in rows) < 1.5


def test_identity_error_grows_with_drift():
    prompt, frames = rendered(2)
    clean = measure_chunks(frames, prompt, 3)[-1]
    fade = np.linspace(1, 0.7, len(frames))[:, None, None, None]
    gone = frames.copy()
    gone[15:] = first_look(2)[0].background
    swollen = frames.copy()
    swollen[15:] = frames[15:].repeat(2, axis=1).repeat(2, axis=2)[:, 32:96, 32:96]
    for broken in (frames * fade, gone, swollen):
        assert measure_chunks(broken, prompt, 3)[-1]["identity_error"] > 3 * clean["identity_error"]
    assert not measure_chunks(gone, prompt, 3)[-1]["present"]


def test_scattered_detects_an_object_in_pieces():
    prompt, frames = rendered(2)
    clean = measure_chunks(frames, prompt, 3)[-1]
    tiled = np.tile(frames[:, ::2, ::2], (1, 2, 2, 1))  # four small ones
    pieces = measure_chunks(np.concatenate([frames[:15], tiled[15:]]), prompt, 3)[-1]
    assert clean["scattered"] < 0.05 and pieces["scattered"] == pytest.approx(0.75, abs=0.05)


def test_looks_work_without_a_prompt():
    _, frames = rendered(0, 6)
    still = np.repeat(frames[:1], 3, axis=0)
    assert frame_look(still)["flow"] == pytest.approx(0, abs=1e-3) and frame_look(still)["flicker"] == 0
    assert frame_look(frames)["flow"] > 2e-4
    grey = np.full((3, 64, 64, 3), 0.5)
    assert frame_look(grey)["saturation"] == frame_look(grey)["contrast"] == frame_look(grey)["sharpness"] == 0
    assert frame_look(frames * 0.5)["L_mean"] < frame_look(frames)["L_mean"]


# Controls and defects


def latents_of(pipe, seeds=(5, 6), num_chunks=6, method="tokentrim", **settings):
    collected = []
    output = pipe(
        sample_prompts(list(seeds)),
        num_frames=3 * num_chunks,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        on_chunk=lambda index, chunk, decisions: collected.append(chunk),
        method=method,
        **settings,
    )
    return output, collected


def test_controls_take_the_settings_of_a_dict():
    settings = {"reference": "first", "regenerate": False, "prune_fraction": 0.5}
    change = OTHER_POLICIES["random_tokens"]
    (policy,) = change({"method": {"tokentrim": settings}, "warmup_chunks": 6, "num_sink_frames": 3})["method"]
    assert (policy.reference, policy.regenerate, policy.prune_fraction) == tuple(settings.values())
    assert policy.warmup_chunks == 6


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_controls_share_the_first_trigger_and_differ_after_it(pipe, name):
    ours, _ = latents_of(pipe, **TRIM)
    theirs, _ = latents_of(pipe, **OTHER_POLICIES[name]({"method": "tokentrim", **TRIM}))
    pairs = [
        next((video, *pair) for pair in zip(ours.decisions[video], theirs.decisions[video]) if pair[0]["trim"])
        for video in range(2)
        if any(decision["trim"] for decision in ours.decisions[video])
    ]
    assert pairs
    for video, one, other in pairs:
        assert other["trim"] and one["severity"] == pytest.approx(other["severity"], abs=1e-4)
        assert len(other["tokens"]) == len(one["tokens"])
        assert (one["tokens"] == other["tokens"]) == name.startswith("fresh_noise")
        start = 3 * one["chunk"]
        assert torch.allclose(ours.frames[video, :, :start], theirs.frames[video, :, :start], atol=1e-4)
        assert not torch.allclose(ours.frames[video, :, start:], theirs.frames[video, :, start:], atol=1e-2)


def test_correction_afterwards_changes_frames_but_not_the_context(pipe):
    plain, chunks = latents_of(pipe, seeds=(5,), num_chunks=3, method="plain")
    shown = pipe.decode_latents(correct_afterwards(plain.frames, 3), "pt")
    held = torch.cat([MatchDistribution(chunks[0][0])(chunk[0])[None] for chunk in chunks], dim=2)
    torch.testing.assert_close(shown, pipe.decode_latents(held, "pt"))
    assert (shown - pipe.decode_latents(plain.frames, "pt")).abs().amax(dim=(0, 2, 3, 4))[-1] > 0.01


def test_correction_in_pixels_restores_the_first_colors():
    frames = np.random.default_rng(0).uniform(0.3, 0.7, size=(2, 1, 8, 8, 3)).astype(np.float32)
    faded = np.concatenate([frames, 0.8 * frames + 0.05, frames[:, :, ::-1]], axis=1)
    corrected = correct_in_pixels(faded, 1)
    np.testing.assert_allclose(corrected, np.concatenate([frames, frames, frames[:, :, ::-1]], axis=1), atol=1e-5)


@pytest.mark.parametrize("kind", DEFECTS)
def test_defects_hit_one_chunk_of_one_video(pipe, kind):
    painted = Painted([kind, None], [5, 6], at_chunk=2)
    _, clean = latents_of(pipe, num_chunks=4, method="plain")
    output, broken = latents_of(pipe, num_chunks=4, method=[painted, "plain"])
    changed = [(one - other).abs().amax(dim=(1, 2, 3, 4)).tolist() for one, other in zip(clean, broken)]
    assert changed[:3] == [[0, 0]] * 3  # what is shown is painted afterwards
    assert changed[3][0] > 0.01 and changed[3][1] < 1e-3  # the next chunk read it
    shown = paint_chunk(output.frames, painted, 3)
    difference = (shown - output.frames).abs().amax(dim=(1, 3, 4)).unflatten(1, (4, 3)).amax(dim=2)  # (videos, chunks)
    assert difference[0, 2] > 1 and difference.count_nonzero() == 1


def test_next_chunk_is_compared_with_the_painted_one(pipe):
    painted = Painted(["noise_region"], [5], at_chunk=2)
    clean, _ = latents_of(pipe, seeds=(5,), num_chunks=4, method="plain")
    broken, _ = latents_of(pipe, seeds=(5,), num_chunks=4, method=[painted, {"tokentrim": {"max_regenerations": 0}}])
    severities = [[each["severity"] for each in output.decisions[0]] for output in (clean, broken)]
    assert severities[0][:3] == severities[1][:3] and severities[1][3] > severities[0][3]


def test_signals_start_at_zero_and_detect_a_shift(pipe):
    _, latents = latents_of(pipe, num_chunks=4, method="plain")
    shifted = [*latents[:3], latents[3] + 2]
    for name, signal in SIGNALS.items():
        values, moved = signal(latents, (1, 2, 2)), signal(shifted, (1, 2, 2))
        assert values.shape == (2, 4) and torch.isfinite(values).all()
        assert torch.equal(values[:, :3], moved[:, :3])
        if name == "nearest_reference":  # blind to a global offset on purpose
            torch.testing.assert_close(values, moved, atol=1e-3, rtol=0)
        else:
            assert (moved[:, 3] > values[:, 3]).all() and (values[:, 0] == 0).all()


# Arithmetic


def test_area_under_curve():
    bad = np.array([False, False, True, True])
    assert area_under_curve(np.array([1.0, 2.0, 3.0, 4.0]), bad) == 1
    assert area_under_curve(np.array([4.0, 3.0, 2.0, 1.0]), bad) == 0
    assert area_under_curve(np.array([1.0, 1.0, 1.0, 1.0]), bad) == 0.5


# Experiments


def write(tmp_path, **settings):
    path = tmp_path / "small.yaml"
    settings = {
        "methods": {"plain": {"method": "plain"}, "trimmed": TRIM},
        "num_seeds": 2,
        "batch_size": 1,
        "num_chunks": 4,
        **settings,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def run(path, out, processes=2):
    command = [sys.executable, "-m", "research.evaluation.run", "--config", str(path), "--out", str(out)]
    return subprocess.run(
        [*command, "--processes", str(processes)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_experiment_resumes_grows_and_refuses_other_settings(tmp_path):
    path, out = write(tmp_path), tmp_path / "out"
    done = run(path, out)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out / "table.csv.gz")
    assert len(table) == 2 * 2 * 4 and not table.duplicated(["method", "seed", "chunk"]).any()
    assert (out / "curves.png").exists() and (out / "cases-trimmed.jpg").exists()
    assert "excess drift" in (out / "report.md").read_text()
    plain, trimmed = (table[table["method"] == method] for method in ("plain", "trimmed"))
    assert trimmed["trim"].any() and not plain["trim"].any()
    first = [rows.loc[rows["chunk"] == 0, "identity_error"].to_numpy() for rows in (plain, trimmed)]
    np.testing.assert_allclose(*first, atol=1e-4)  # the same prompts and noise
    assert trimmed["calls"].sum() > plain["calls"].sum()
    read = [*8 * (3, 6, 9, 12), 3, 6, 9]  # frames, in 8 steps of each chunk and at three commits
    np.testing.assert_allclose(plain["keys"], np.mean(read), rtol=1e-4)

    parts = {part: part.stat().st_mtime_ns for part in (out / "parts").glob("*.csv")}
    next(iter(parts)).unlink()
    methods = {"plain": {"method": "plain"}, "trimmed": TRIM, "held": {"method": {"reanchor": {"match": "mean"}}}}
    assert run(write(tmp_path, methods=methods), out, processes=1).returncode == 0
    unchanged = [part for part, time in parts.items() if part.stat().st_mtime_ns == time]
    assert len(unchanged) == len(parts) - 1
    grown = pd.read_csv(out / "table.csv.gz")
    pd.testing.assert_frame_equal(
        grown[grown["method"] != "held"]
        .drop(columns="seconds")
        .sort_values(["method", "seed", "chunk"])
        .reset_index(drop=True),
        table.drop(columns="seconds").sort_values(["method", "seed", "chunk"]).reset_index(drop=True),
        rtol=1e-2,
        atol=1e-3,
    )

    other = run(write(tmp_path, methods={"plain": {"method": "tokentrim"}}), out)
    assert other.returncode != 0 and "methods['plain']" in other.stderr and "name another --out" in other.stderr
    other = run(write(tmp_path, num_chunks=5), out)
    assert other.returncode != 0 and "num_chunks" in other.stderr
    assert json.loads((out / "experiment.json").read_text())["num_chunks"] == 4


def test_a_file_of_prompts_needs_no_world(tmp_path, pipe):
    """For a custom checkpoint, the report has the measures that need no true video."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving right over a blue background\n\na green square over a white background\n")
    experiment = Experiment.load(write(tmp_path, prompts_file=str(prompts), num_seeds=3, first_seed=4))
    assert experiment.world is None
    assert [prompt.split()[1] for prompt in experiment.prompts([4, 5, 6])] == ["red", "green", "red"]
    tables = []
    (tmp_path / "parts").mkdir()
    for method, seeds in experiment.jobs():
        rows, frames = run_job(pipe, experiment, method, seeds)
        assert frames.shape[:2] == (1, experiment.num_chunks)
        np.savez_compressed(part(tmp_path, method, seeds).with_suffix(".npz"), frames=frames)
        tables.append(rows)
    table = pd.concat(tables)
    assert "identity_error" not in table and table["saturation"].between(0, 1).all()
    report = write_report(table, experiment, tmp_path)
    assert "prompts of" in report and "flow" in report and (tmp_path / "curves.png").exists()


def test_crashed_worker_keeps_finished_results(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "none"}')
    path, out = write(tmp_path, checkpoint=str(broken)), tmp_path / "out"
    failed = run(path, out, processes=1)
    assert failed.returncode != 0 and "workers.log" in failed.stderr and "4 of 4 batches" in failed.stderr
    assert "Error" in (out / "workers.log").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": {}}, "`methods`"),
        ({"methods": {"x": {"colour": 1}}}, "method 'x': the pipeline's call takes no colour"),
        ({"methods": {"x": {"config": "best"}}}, "unknown config 'best'; there are .*paper"),
        ({"cases": ["y"]}, "unknown cases .*y"),
        ({"methods": {"x": {"control": "best"}}}, "unknown control 'best'; there are .*random_tokens"),
        ({"scenes": ["storm"]}, "unknown scenes .*storm.*static, turn"),
        ({"defects": ["scratch"]}, "unknown defects .*scratch.*half_frame"),
        ({"checkpoint": "checkpoints/none"}, "`checkpoint` .*'checkpoints/none'"),
        ({"prompts_file": "none.txt"}, "`prompts_file` .*'none.txt' has none"),
        ({"num_seeds": 0}, "`num_seeds` .*0"),
        ({"base": "none.yaml"}, "`base` .*'none.yaml'"),
        ({"seeds": 4}, "unknown settings .*seeds.*first_seed"),
    ],
)
def test_bad_experiments_raise(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Experiment.load(write(tmp_path, **settings))


def test_experiment_inherits_settings_of_its_base(tmp_path):
    base = Experiment.load(write(tmp_path))
    (tmp_path / "longer.yaml").write_text("base: small.yaml\nnum_chunks: 8\n")
    longer = Experiment.load(tmp_path / "longer.yaml")
    assert longer == replace(base, name="longer", num_chunks=8)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "research" / "evaluation" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_committed_experiments_load(path, tmp_path):
    settings = yaml.safe_load(path.read_text())
    if settings.get("checkpoint", "").startswith("research/runs"):  # to be fetched by a command that the file names
        assert "git archive" in path.read_text()
        path = write(tmp_path, **{**settings, "checkpoint": "checkpoints/tiny-world"})
    experiment = Experiment.load(path)
    assert len(experiment.jobs()) == len(experiment.methods) * -(-experiment.num_seeds // experiment.batch_size)


def test_released_videos_differ_from_held_ones():
    drift = {"plain": [0.3, 0.2, 0.1], "with tolerance 0.085": [0.2, 0.04, 0.02], "tokentrim_plus": [0.05, 0.04, 0.02]}
    rows = [(method, seed, each, each) for method, each_seed in drift.items() for seed, each in enumerate(each_seed)]
    videos = pd.DataFrame(rows, columns=["method", "seed", "excess_drift", "color_drift"])
    _, _, released, held = releases(videos, "excess_drift", "plain").splitlines()
    assert released == "| released with tolerance 0.085 | 1 | 0.3 | 0.2 | 0.05 |"
    assert held == "| held with tolerance 0.085 | 2 | 0.15 | 0.03 | 0.03 |"


def test_summaries_by_video():
    chunks = np.arange(20)
    still = ("background_error", "object_error", "scattered", "motion", "flow", "keys", "seconds")
    rows = {name: np.zeros(20) for name in still} | {"calls": 9}
    looks = dict.fromkeys(frame_look(np.full((3, 64, 64, 3), 0.5)), chunks / 10)
    table = pd.concat(
        pd.DataFrame(
            {
                **rows,
                **looks,
                "method": method,
                "seed": seed,
                "prompt": "x",
                "chunk": chunks,
                "identity_error": 0.125 + slope * chunks,
                "area": 0.2,
                "present": True,
                "shape_right": True,
                "trim": False,
                "quarantined": False,
            }
        )
        for method, slope in (("plain", 0.01), ("held", 0.0))
        for seed in (1, 2)
    )
    videos = video_table(table, Experiment("x", {"plain": {}, "held": {}}))
    plain = videos[videos["method"] == "plain"]
    np.testing.assert_allclose(plain["excess_drift"], 0.01 * (14.5 - 2))
    np.testing.assert_allclose(plain["slope_saturation"], 0.1)
    np.testing.assert_allclose(plain["contrast_saturation"], 0.1 * 17)
    np.testing.assert_allclose(paired(videos, "excess_drift", "held", "plain"), -0.125)
    *_, last = summary(table, videos, ["plain", "held"], "plain").splitlines()
    assert last.startswith(
        "| held | 0.0000 | -0.1250 [-0.1250, -0.1250] | 0.00 | 0.00 | 100% | 0.00 | +0.00 | 0.00, 0 | 0.0 | 1.000x"
    )
