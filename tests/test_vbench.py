"""VBench: videos of its prompts, the calls of its package, and its published arithmetic.

The tests do not install the package. A double replaces it: a real virtual environment with a package `vbench` that has
two prompts, the interface of the real package, and a score only for `temporal_flickering`.
"""

import json
import venv

import pytest
import yaml
from builders import full_pipeline
from conftest import ROOT
from diffusers import FlowMatchLCMScheduler
from fresh import Nursery

from research.evaluation import vbench
from research.evaluation.vbench_scores import DIMENSIONS, QUALITY, table, totals


PROMPTS = [
    {"prompt_en": "a red circle, frozen", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a blue square moving left", "dimension": ["subject_consistency", "dynamic_degree"]},
    {"prompt_en": "a green circle", "dimension": ["dynamic_degree"]},
    {"prompt_en": "a red circle, frozen", "dimension": ["temporal_flickering"]},  # VBench has such twins
]
DOUBLE = """
import json, os

class VBench:
    def __init__(self, device, info, out):
        self.info, self.out = info, out

    def evaluate(self, videos_path, name, dimension_list, mode):
        for dimension in dimension_list:
            if dimension != "temporal_flickering":
                raise OSError("Name or service not known")
        videos = [{"video_path": video, "video_results": 0.9} for video in os.listdir(videos_path)]
        os.makedirs(self.out)
        with open(f"{self.out}/{name}_eval_results.json", "w") as file:
            json.dump({dimension_list[0]: [0.9, videos]}, file)
"""

CLI = """
import argparse, os, shutil

def main():
    parser = argparse.ArgumentParser()
    for name in ("task", "--videos_path", "--result_path"):
        parser.add_argument(name)
    options = parser.parse_args()
    os.makedirs(f"{options.result_path}/filtered_videos")
    for name in sorted(os.listdir(options.videos_path))[:3]:
        shutil.copy(f"{options.videos_path}/{name}", f"{options.result_path}/filtered_videos")
"""
EVAL_LONG = """
import argparse, json, os, sys

parser = argparse.ArgumentParser()
for name in ("videos_path", "full_json_dir", "output_path", "mode", "dimension"):
    parser.add_argument(f"--{name}")
parser.add_argument("--dev_flag", action="store_true")
options = parser.parse_args()
assert os.environ["PYTHONPATH"] in sys.path
os.makedirs(f"{options.videos_path}/split_clip")
assert os.listdir(options.videos_path)[-1] == "split_clip"
os.makedirs(options.output_path)
with open(f"{options.output_path}/results_today_eval_results.json", "w") as file:
    json.dump({options.dimension: [0.8, os.listdir(options.videos_path)[:-1], []]}, file)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    package = next(folder.glob("lib/python*/site-packages")) / "vbench"
    package.mkdir()
    (package / "__init__.py").write_text(DOUBLE)
    (package.parent / "torch.py").write_text("device = str")  # all that is asked of it
    (package / "cli").mkdir()
    (package / "cli" / "vbench.py").write_text(CLI)
    (package / "VBench_full_info.json").write_text(json.dumps(PROMPTS))
    return folder / "bin" / "python"


def named(folder, *names):
    """A folder of empty files with names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def score(python, *arguments):
    return vbench.score(vbench.parse(["score", *map(str, arguments), "--python", str(python)]))


def record(folder, dimension="temporal_flickering"):
    return json.loads((folder / "vbench" / f"{dimension}.json").read_text())


# Generating


def start(nursery, folder, python, *arguments):
    argv = [
        "vbench",
        "generate",
        "--python",
        str(python),
        "--checkpoint",
        "checkpoint",
        "--num-frames",
        "9",
        *arguments,
    ]
    script = f"import runpy, sys\nsys.path[:0] = ['{ROOT / 'tests'}']\nimport conftest\nsys.argv = {argv}\n"
    script += "try:\n    runpy.run_module('research.evaluation.vbench', run_name='__main__')\n"
    printed, said = nursery.run(f"{script}except (SystemExit, ValueError) as end:\n    print('end:', end)", folder)
    return printed + "\n".join(said)


def test_generate_and_score(tmp_path, python):
    """Names are VBench's, noise is equal for all methods, existing videos stay, and the videos can be scored."""
    full_pipeline(FlowMatchLCMScheduler(shift=5.0)).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "plain.json").write_text(json.dumps({"method": "plain"}))
    (tmp_path / "others.yaml").write_text(yaml.safe_dump({"methods": {"shut": {"method": "plain"}}}))
    plain, names = tmp_path / "out" / "plain", ["a red circle, frozen-0.mp4", "a blue square moving left-0.mp4"]
    arguments = ["--methods", "plain.json", "others.yaml", "--out", "out", "--videos", "1", "--prompts", "1"]
    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        printed = start(nursery, tmp_path, python, *arguments)
        assert "4 done, 0 failed" in printed and "end: False" in printed
        assert sorted(path.name for path in plain.glob("*.mp4")) == sorted(names)
        videos = {name: (plain / name).read_bytes() for name in names}
        assert videos == {name: (tmp_path / "out" / "shut" / name).read_bytes() for name in names}
        assert videos[names[0]] != videos[names[1]]

        (plain / names[1]).unlink()
        assert "1 to generate, 3 there already" in start(nursery, tmp_path, python, *arguments)
        assert (plain / names[1]).read_bytes() == videos[names[1]]

    other = ["--methods", str(tmp_path / "plain.json"), "--out", str(tmp_path / "out"), "--python", str(python)]
    with pytest.raises(ValueError, match="--out: .* has videos of other settings .checkpoint, plain.: name another"):
        vbench.generate(vbench.parse(["generate", *other]))
    assert score(python, plain, "--dimensions", "temporal_flickering", "--partial", "--no-static-filter") == 0
    assert record(plain)["score"] == 0.9 and record(plain)["names"] == names[:1]


def jobs(*arguments):
    options = vbench.parse(["generate", "--methods", "a.json", "--out", "out", *arguments])
    return vbench.list_jobs(options, PROMPTS, {"plain": {}, "sink": {"num_sink_frames": 3}})


def test_jobs(tmp_path):
    """25 videos to filter and 5 otherwise; a video has the same seed in every method and in any part."""
    seeds = {job.path.name: job.seed for job in jobs()}
    assert len(jobs()) == 2 * len(seeds) and len(seeds) == len(set(seeds.values())) == 25 + 5 + 5
    assert all(job.seed == seeds[job.path.name] for job in jobs())
    part = jobs("--dimensions", "dynamic_degree", "--prompts", "1", "--videos", "7")
    assert {job.path.name for job in part} == {f"a blue square moving left-{index}.mp4" for index in range(7)}
    assert all(seeds.get(job.path.name, job.seed) == job.seed for job in part)

    (tmp_path / "rewritten.txt").write_text("one\ntwo\nthree\nfour\n")
    written = jobs("--rewritten", str(tmp_path / "rewritten.txt"), "--dimensions", "subject_consistency")
    plain = jobs("--dimensions", "subject_consistency")
    assert {job.prompt for job in written} == {"two"} and [job.path for job in written] == [job.path for job in plain]
    with pytest.raises(ValueError, match="--rewritten: .* has 1 lines for 4 prompts"):
        (tmp_path / "rewritten.txt").write_text("one")
        jobs("--rewritten", str(tmp_path / "rewritten.txt"))


# Scoring


def test_scores_are_kept_until_something_changes(tmp_path, python):
    folder = named(tmp_path / "plain", *(f"a red circle, frozen-{index}.mp4" for index in range(4)), "notes.txt")
    arguments = [folder, "--dimensions", "temporal_flickering", "--no-static-filter"]
    assert score(python, *arguments) == 1  # one of five is missing
    assert score(python, *arguments, "--partial") == 0
    assert len(record(folder)["results"]) == record(folder)["videos"] == 4 and record(folder)["of"] == 5
    path = folder / "vbench" / "temporal_flickering.json"
    before = path.stat().st_mtime_ns
    assert score(python, *arguments, "--partial") == 0 and path.stat().st_mtime_ns == before
    named(folder, "a red circle, frozen-4.mp4")
    assert score(python, *arguments) == 0 and record(folder)["videos"] == 5
    assert score(python, *arguments, "--mode", "custom_input") == 0 and record(folder)["mode"] == "custom_input"
    assert sorted(each.name for each in path.parent.iterdir()) == [
        path.with_suffix(suffix).name for suffix in (".json", ".log")
    ]


def test_static_filter_selects_still_videos(tmp_path, python):
    """VBench's rule for temporal_flickering: of 25 videos of a prompt, the still ones are scored."""
    folder = named(tmp_path / "plain", *(f"a red circle, frozen-{index}.mp4" for index in range(5)))
    assert score(python, folder, "--dimensions", "temporal_flickering") == 1
    named(folder, *(f"a red circle, frozen-{index}.mp4" for index in range(25)))
    assert score(python, folder, "--dimensions", "temporal_flickering") == 0
    assert record(folder)["static_filter"] and record(folder)["videos"] == 25 and len(record(folder)["results"]) == 3


@pytest.mark.parametrize("mode, names", [("long_vbench_standard", 5), ("long_custom_input", 7)])
def test_long_videos_are_scored(mode, names, tmp_path, python):
    folder = named(tmp_path / "plain", "one.mp4", "two_2.mp4", *(f"a green circle-{index}.mp4" for index in range(5)))
    script = tmp_path / "VBench" / "vbench2_beta_long" / "eval_long.py"
    named(script.parent)
    script.write_text(EVAL_LONG)
    arguments = ["--mode", mode, "--repository", tmp_path / "VBench", "--dimensions", "dynamic_degree", "--partial"]
    assert score(python, folder, *arguments) == 0
    found = record(folder, "dynamic_degree")
    assert (found["score"], found["mode"], len(found["names"]), len(found["results"])) == (0.8, mode, names, names)
    assert not any("_" in name for name in found["results"])
    assert len(list(folder.iterdir())) == 7 + 1  # and the scores


def test_missing_weights_and_videos_name_the_dimension(tmp_path, python, capsys):
    """The failure is reported, and the other dimensions are scored."""
    folder = named(tmp_path / "any", "one.mp4", "two_2.mp4")
    dimensions = ["--dimensions", "motion_smoothness", "temporal_flickering"]
    assert score(python, folder, "--mode", "custom_input", *dimensions) == 1
    said = capsys.readouterr().err
    assert "motion_smoothness: no score" in said and "amt_model/amt-s.pth" in said and "$VBENCH_CACHE_DIR" in said
    assert "'OSError: Name or service not known'" in said and record(folder)["videos"] == 2
    assert score(python, folder, "--dimensions", "dynamic_degree") == 1
    said = capsys.readouterr().err
    assert "dynamic_degree" in said and "0 of 10 videos" in said and "'a blue square moving left-0.mp4'" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["score", "x", "--dimensions", "colour"], "--dimensions: invalid choice: 'colour' (choose from"),
        (["score", "x", "--mode", "custom_input", "--dimensions", "color"], "['color'] need VBench's prompts"),
        (
            ["score", "x", "--mode", "long_custom_input"],
            "--repository must be a clone of https://github.com/Vchitect",
        ),
        (
            ["generate", "--methods", "x.json", "--out", "x", "--videos", "0"],
            "--videos must be at least 1, but is 0",
        ),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit):
        vbench.parse(arguments)
    assert message in capsys.readouterr().err


def test_bad_environments_and_methods_raise(tmp_path):
    venv.create(tmp_path / "empty", symlinks=True)
    for python, message in (
        (tmp_path / "none", "is not there"),
        (tmp_path / "empty" / "bin" / "python", "has no vbench"),
    ):
        with pytest.raises(FileNotFoundError, match=f"--python must be .*{python}.* {message}"):
            score(python, tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"colour": 1}))
    with pytest.raises(ValueError, match="--methods: .*a.json: the pipeline's call takes no colour"):
        vbench.read_methods([tmp_path / "a.json"])
    with pytest.raises(ValueError, match="plus.yaml has controls, .*'corrected in latents'"):
        vbench.read_methods([ROOT / "research" / "evaluation" / "configs" / "plus.yaml"])


# Tabulating

# Rows of VBench's leaderboard, in per cent, as LinGen (arXiv 2412.09856) quotes them: the dimensions in the order of
# DIMENSIONS (the heads of dynamic, aesthetic and imaging are interchanged there), then quality, semantic and total.
PUBLISHED = {
    "T2V-Turbo-v2": (
        [95.50, 96.71, 97.35, 97.07, 90.00, 62.61, 71.78]
        + [95.33, 61.49, 96.20, 92.53, 43.32, 56.40, 24.17, 27.06, 28.26],
        [85.13, 77.12, 83.52],
    ),
    "Runway Gen-3": (
        [97.10, 96.62, 98.61, 99.23, 60.14, 63.34, 66.82]
        + [87.81, 53.64, 96.40, 80.90, 65.09, 54.57, 24.31, 24.71, 26.69],
        [84.11, 75.17, 82.32],
    ),
    "Pika-1.0": (
        [96.94, 97.36, 99.74, 99.50, 47.50, 62.04, 61.87]
        + [88.72, 43.08, 86.20, 90.57, 61.03, 49.83, 22.26, 24.22, 25.94],
        [82.92, 71.77, 80.69],
    ),
    "VideoCrafter-2.0": (
        [96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22]
        + [92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23],
        [82.20, 73.42, 80.44],
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_totals_equal_the_leaderboard(model):
    scores, published = PUBLISHED[model]
    found = totals({name: value / 100 for name, value in zip(DIMENSIONS, scores, strict=True)})
    assert [100 * found[name] for name in ("quality", "semantic", "total")] == pytest.approx(published, abs=0.011)


def test_table(tmp_path):
    """Totals need all dimensions on all videos; otherwise they are missing, with the reason."""
    scores = {name: value / 100 for name, value in zip(DIMENSIONS, PUBLISHED["VideoCrafter-2.0"][0])}
    (tmp_path / "whole.json").write_text(
        json.dumps({name.replace("_", " "): [value, []] for name, value in scores.items()})
    )
    (tmp_path / "quality.json").write_text(json.dumps({name: scores[name] for name in QUALITY}))
    common = {"mode": "vbench_standard", "videos": 5, "of": 5, "static_filter": True}
    for folder, changed in (
        ("partial", {"videos": 4}),
        ("mixed", {"mode": "long_vbench_standard"}),
        ("unfiltered", {"static_filter": False}),
    ):
        (tmp_path / folder / "vbench").mkdir(parents=True)
        for name, value in scores.items():
            content = {
                "dimension": name,
                "score": value,
                **common,
                **(changed if name == "temporal_flickering" else {}),
            }
            (tmp_path / folder / "vbench" / f"{name}.json").write_text(json.dumps(content))
    printed = table([tmp_path / name for name in ("whole.json", "quality.json", "partial", "mixed", "unfiltered")])
    assert "| temporal flickering | 98.41 | 98.41 | 98.41 | 98.41 | 98.41 |" in printed
    assert "| object class | 92.55 |  | 92.55 | 92.55 | 92.55 |" in printed
    assert "| quality | 82.20 | 82.20 |  |  | 82.20 |" in printed
    assert "| semantic | 73.42 |  | 73.42 |  | 73.42 |" in printed
    assert "| total | 80.44 |  |  |  | 80.44 |" in printed
    assert "\nquality: no total: 9 of 16 dimensions have no score." in printed
    assert "\npartial: temporal_flickering covers 4 of 5 videos and enters no total." in printed
    assert "\nmixed: scored as long_vbench_standard and vbench_standard, hence no totals." in printed
    assert "\nunfiltered: temporal_flickering has no static filter." in printed

    (tmp_path / "percent.json").write_text(json.dumps({"color": 92.9}))
    with pytest.raises(ValueError, match="percent.json: 'color' is 92.9; expected: a score in"):
        table([tmp_path / "percent.json"])
