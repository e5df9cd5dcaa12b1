"""`tokentrim generate` and `examples/generate.py`, as their users start them."""

import json
import os
import subprocess
import sys

import pytest
from builders import full_pipeline
from conftest import ROOT
from diffusers import FlowMatchLCMScheduler
from fresh import Nursery

from tokentrim.tools.cli import main
from tokentrim.tools.generate import read_jobs, read_settings


SCRIPT = ROOT / "examples" / "generate.py"
PROMPTS = ["a red circle moving right", "", "a blue square moving left", "a green circle"]
NAMES = ["00000-a-red-circle-moving-right", "00002-a-blue-square-moving-left", "00003-a-green-circle"]


@pytest.fixture
def here(tmp_path):
    full_pipeline(FlowMatchLCMScheduler(shift=5.0)).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "rollout.json").write_text(json.dumps({"window_size": 9, "num_frames": 21}))
    (tmp_path / "trim.json").write_text(json.dumps({"drift_sensitivity": 0.0, "warmup_chunks": 1, "num_frames": 33}))
    return tmp_path


OPTIONS = ["--checkpoint", "checkpoint", "--config", "rollout.json", "--config", "trim.json", "--fps", "8"]


def start(nursery, folder, *arguments):
    argv = [str(SCRIPT), *arguments, *OPTIONS]
    script = f"import runpy, sys\nsys.argv = {argv}\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    printed, said = nursery.run(f"{script}except SystemExit as end:\n    print('exit', int(end.code))", folder)
    return printed + "\n".join(said)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_many_prompts(here):
    """Two processes make what one makes, bit by bit; a failure is reported and the rest goes on; a second start does
    what is left; one prompt with its seed is one of them."""
    (here / "two" / f"{NAMES[1]}.mp4").mkdir(parents=True)  # a video cannot be written there
    arguments = ["--prompts", "prompts.txt", "--out", "two", *OPTIONS]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT, *arguments],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(here / "hf")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stdout == "2 done, 1 failed\n" and "3 to generate, 0 there already" in process.stderr
    assert f"two/{NAMES[1]}.mp4: IsADirectoryError" in process.stderr
    assert "process 0: 100%" in process.stderr and "process 1: 100%" in process.stderr
    (here / "two" / f"{NAMES[1]}.mp4").rmdir()
    written = {
        name: (here / "two" / name).stat().st_mtime_ns for name in contents(here / "two") if "00002" not in name
    }

    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        printed = start(nursery, here, "--prompts", "prompts.txt", "--out", "two")
        assert "1 to generate, 2 there already" in printed and "1 done, 0 failed\nexit 0" in printed
        assert {name: (here / "two" / name).stat().st_mtime_ns for name in written} == written
        assert "exit 0" in start(nursery, here, "--prompts", "prompts.txt", "--out", "one")
        assert sorted(contents(here / "one")) == sorted(f"{name}.{kind}" for name in NAMES for kind in ("mp4", "json"))
        assert contents(here / "one") == contents(here / "two")
        assert not list((here / "two").glob(".*"))

        assert "exit 0" in start(nursery, here, PROMPTS[2], "--out", "deep/down/square.mp4", "--seed", "2")
        assert (here / "deep" / "down" / "square.mp4").read_bytes() == contents(here / "one")[f"{NAMES[1]}.mp4"]
        assert "0 to generate, 1 there already" in start(nursery, here, PROMPTS[2], "--out", "deep/down/square.mp4")

    records = [json.loads((here / "one" / f"{name}.json").read_text()) for name in NAMES]
    found = [(record["prompt"], record["seed"], len(record["decisions"])) for record in records]
    assert found == [(PROMPTS[number], number, 3) for number in (0, 2, 3)]
    trims = [decision["trim"] for record in records for decision in record["decisions"]]
    assert any(trims)  # at the sensitivity of the second config file, half of the chunks after warm-up


def test_seeds_do_not_depend_on_the_number_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    jobs = read_jobs(tmp_path / "prompts.txt", tmp_path, 5, {})
    assert [(job.seed, job.path.stem) for job in jobs] == list(zip((5, 7, 8), NAMES))


def test_later_settings_count(here):
    settings = read_settings([here / "rollout.json", here / "trim.json"])
    assert settings == {"window_size": 9, "num_frames": 33, "drift_sensitivity": 0.0, "warmup_chunks": 1}
    for content in ("[1]", "{"):
        (here / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json has to hold one JSON object"):
            read_settings([here / "bad.json"])


SHARED = ["--checkpoint", "nowhere"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a prompt", "--out", "videos", *SHARED], "--out has to end with .mp4 for one prompt, but is 'videos'"),
        (["a prompt", "--prompts", "prompts.txt", "--out", "videos", *SHARED], "not allowed with"),
        (["--out", "a.mp4", *SHARED], "one of the arguments"),
        (["a prompt", "--out", "a.mp4"], "required: --checkpoint"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--method", "none"], "--method has to be one of plain, tokentrim, "),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_options_count_more_than_files(here, monkeypatch):
    jobs = []
    monkeypatch.setattr("tokentrim.tools.generate.generate_missing", lambda listed, *_: jobs.extend(listed) or 0)
    (here / "method.json").write_text(json.dumps({"method": "paper", "num_frames": 33, "window_size": 9}))
    config = ["--config", str(here / "method.json")]
    assert (
        main(["generate", "a prompt", "--out", "a.mp4", *SHARED, *config, "--method", "plain", "--num-frames", "9"])
        == 0
    )
    assert main(["generate", "a prompt", "--out", "a.mp4", *SHARED, *config]) == 0
    assert [job.settings for job in jobs] == [
        {"method": "plain", "num_frames": 9, "window_size": 9},
        {"method": "paper", "num_frames": 33, "window_size": 9},
    ]


def test_files_that_are_missing(tmp_path, capsys):
    none = str(tmp_path / "none")
    for arguments in (["--prompts", none, "--out", "videos"], ["a prompt", "--out", "a.mp4", "--config", none]):
        assert main(["generate", *arguments, *SHARED]) == 1
        assert f"No such file or directory: '{none}'" in capsys.readouterr().err
