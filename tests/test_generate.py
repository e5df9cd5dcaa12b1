"""`tokentrim generate` and `examples/generate.py`, as users start them."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from builders import full_pipeline
from conftest import ROOT
from diffusers import FlowMatchLCMScheduler
from fresh import Nursery

from tokentrim.tokentrim_files.run_state import load_state
from tokentrim.tokentrim_frames.mp4 import LineWriter, VideoWriter
from tokentrim.tools import generate
from tokentrim.tools.cli import main
from tokentrim.tools.generate import play, verify
from tokentrim.tools.jobs import Job, read_jobs, read_schedule, read_settings
from tokentrim.tools.records import check_records, fingerprint_folder, make_record, write_record


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


def test_several_processes_write_the_files_of_one(here):
    """Two processes make the same files as one, bit by bit. A failure is reported and the others continue. A second
    start finishes the rest. A single prompt with its seed gives the same video."""
    (here / "two").mkdir()
    (here / "two" / f".{NAMES[1]}.mp4.lock").mkdir()  # a video cannot be written there
    arguments = ["--prompts", "prompts.txt", "--out", "two", *OPTIONS]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT, *arguments],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(here / "hf")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert sorted(process.stdout.split()) == [f"{here}/two/{NAMES[0]}.mp4", f"{here}/two/{NAMES[2]}.mp4"]
    assert "2 done, 1 failed" in process.stderr and "3 to generate, 0 there already" in process.stderr
    assert f"two/{NAMES[1]}.mp4: " in process.stderr
    assert "process 0: 100%" in process.stderr and "process 1: 100%" in process.stderr
    (here / "two" / f".{NAMES[1]}.mp4.lock").rmdir()
    written = {
        name: (here / "two" / name).stat().st_mtime_ns for name in contents(here / "two") if "00002" not in name
    }

    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        printed = start(nursery, here, "--prompts", "prompts.txt", "--out", "two")
        assert "1 to generate, 2 there already" in printed and "1 done, 0 failed" in printed and "exit 0" in printed
        assert {name: (here / "two" / name).stat().st_mtime_ns for name in written} == written
        assert "exit 0" in start(nursery, here, "--prompts", "prompts.txt", "--out", "one")
        assert sorted(contents(here / "one")) == sorted(
            f"{name}.{kind}" for name in NAMES for kind in ("mp4", "json", "jsonl")
        )
        assert contents(here / "one") == contents(here / "two")
        assert not list((here / "two").glob("*growing*"))

        assert "exit 0" in start(nursery, here, PROMPTS[2], "--out", "deep/down/square.mp4", "--seed", "2")
        assert (here / "deep" / "down" / "square.mp4").read_bytes() == contents(here / "one")[f"{NAMES[1]}.mp4"]
        again = [PROMPTS[2], "--out", "deep/down/square.mp4"]
        assert "0 to generate, 1 there already" in start(nursery, here, *again, "--seed", "2")
        printed = start(nursery, here, *again, "--seed", "3", "--method", "plain")
        assert printed.startswith("exit 1\n") and printed.splitlines()[-1].startswith("tokentrim generate: error: ")
        assert (
            "square.mp4 is there already, but is another video: seed 2, not 3; method not given, not 'plain'"
            in printed
        )
        (here / "trim.json").write_text(json.dumps({"num_frames": "81"}))
        printed = start(nursery, here, "--prompts", "prompts.txt", "--out", "three")
        assert "\ntokentrim generate: error: `num_frames` must be" in printed and not (here / "three").exists()

    record = json.loads((here / "one" / f"{NAMES[1]}.json").read_text())
    assert (record["prompt"], record["seed"]) == (PROMPTS[2], 2) and record["arguments"]["num_frames"] == 33
    decisions = read_lines(here / "one" / f"{NAMES[1]}.jsonl")
    assert [each["chunk"] for each in decisions] == [0, 1, 2]
    assert decisions[2]["threshold"] == pytest.approx(decisions[1]["severity"])  # the sensitivity of the second config


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Ctrl-C when so many decisions are in the file.
INTERRUPT = """
import os, signal, threading, time
from pathlib import Path

def interrupt():
    while not Path({log!r}).exists() or Path({log!r}).read_text().count("\\n") < {lines}:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
"""


def start_here(nursery, folder, *arguments, interrupt=None):
    """`tokentrim generate`: exit code, stdout and stderr."""
    script = "" if interrupt is None else INTERRUPT.format(log=interrupt[0], lines=interrupt[1])
    script += f"import sys\nsys.argv = ['tokentrim', 'generate', *{list(arguments)}]\n"
    script += "from tokentrim.tools.cli import main\ntry:\n    print('exit', main())\n"
    printed, said = nursery.run(f"{script}except SystemExit as end:\n    print('exit', end.code)", folder)
    return int(printed.split()[-1]), printed, "\n".join(said)


def test_interrupted_run_resumes_to_the_same_files(here):
    (here / "schedule.json").write_text(json.dumps({"2": PROMPTS[2], "6": PROMPTS[3]}))
    options = [
        PROMPTS[0],
        *OPTIONS,
        "--num-frames",
        "117",
        "--seed",
        "3",
        "--method",
        '["tokentrim", "tokentrim_plus"]',
    ]
    options += ["--prompt-schedule", "schedule.json", "--prompt-transition", "flush"]
    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        whole = start_here(nursery, here, *options, "--out", "whole/x.mp4")
        assert whole[0] == 0 and whole[1].splitlines()[0] == str(here / "whole" / "x.mp4"), whole
        options += ["--out", "cut/x.mp4", "--state-dir", "a run", "--save-every", "2"]
        code, _, said = start_here(nursery, here, *options, interrupt=("cut/x.growing.jsonl", 4))
        assert code == 130
        assert f"To continue:\n  tokentrim generate --state-dir '{here / 'a run'}' --resume" in said
        assert sorted(contents(here / "cut")) == ["x.growing.jsonl", "x.growing.mp4"]
        frames = list(imageio.imiter(here / "cut" / "x.growing.mp4"))  # it plays
        assert len(frames) >= 45 and "Stopping after this chunk" in said
        chunks = len(read_lines(here / "cut" / "x.growing.jsonl"))
        assert load_state(here / "a run")["run"]["index"] == chunks  # the last finished chunk is saved
        assert start_here(nursery, here, *options)[0] == 1  # a run is there
        code, _, said = start_here(nursery, here, "--state-dir", "a run", "--resume", "--seed", "4")
        assert code == 2 and "--seed: the run began with 3, not 4" in said
        code, printed, said = start_here(nursery, here, "--state-dir", "a run", "--resume")
        assert code == 0 and "1 done, 0 failed" in said, said
        assert contents(here / "cut") == contents(here / "whole")
        assert len(read_lines(here / "cut" / "x.jsonl")) == 10
        assert not list((here / "a run").glob("state-*"))  # they are of no use any more
        assert "0 to generate, 1 there already" in start_here(nursery, here, "--state-dir", "a run", "--resume")[2]


def test_endless_video_is_complete_after_ctrl_c(here):
    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        options = [PROMPTS[0], *OPTIONS, "--num-frames", "endless"]
        done = start_here(nursery, here, *options, "--out", "x.mp4", interrupt=("x.growing.jsonl", 3))
        assert done[0] == 0 and "1 done, 0 failed" in done[2]
        assert (here / "x.mp4").is_file() and len(read_lines(here / "x.jsonl")) >= 3

        options[-1] = "0"  # the same; with a state it can go on
        options += ["--out", "y.mp4", "--state-dir", "run"]
        code, _, said = start_here(nursery, here, *options, interrupt=("y.growing.jsonl", 3))
        assert code == 130 and "--resume" in said and not (here / "y.mp4").exists()


def test_an_interrupted_video_with_an_end_is_not_complete(here):
    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        options = [PROMPTS[0], *OPTIONS, "--num-frames", "1197", "--out", "x.mp4"]
        code, _, said = start_here(nursery, here, *options, interrupt=("x.growing.jsonl", 2))
        assert code == 130 and not (here / "x.mp4").exists() and (here / "x.growing.mp4").is_file()
        assert "--num-frames 1197 --out x.mp4 --state-dir DIR" in said


def test_a_video_is_complete_only_if_it_plays_to_its_last_frame(tmp_path):
    path = tmp_path / "x.mp4"
    video, lines = VideoWriter(path), LineWriter(path.with_suffix(".jsonl"))
    for chunk in range(3):
        video.write(np.random.default_rng(chunk).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8))
        lines.write("{}")
    verify(path, [4, 4, 4])
    for expected, message in (([4, 4, 5], "12 frames instead of 13"), ([6, 6], "3 decisions instead of 2")):
        with pytest.raises(OSError, match=message):
            verify(path, expected)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-4000] + bytes(3000) + whole[-1000:]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="x.mp4 does not play to its end"):
            verify(path, [4, 4, 4])


def test_the_long_video_of_the_examples(tmp_path):
    """A short one: 12 chunks, stopped by Ctrl-C and started again."""
    script = "import runpy, sys\nsys.argv = ['long_video.py', '--out', 'x.mp4', '--state-dir', 'run', {}]\n"
    script += f"runpy.run_path({str(SCRIPT.with_name('long_video.py'))!r}, run_name='__main__')"
    stops = INTERRUPT.format(log="x.jsonl", lines=3) + script.replace("runpy.run_path", "try:\n    runpy.run_path")
    stops += "\nexcept KeyboardInterrupt:\n    print('stopped')"
    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        printed, _ = nursery.run(stops.format("'--minutes', '0.05'"), tmp_path)
        assert "stopped" in printed and len(list((tmp_path / "run").iterdir())) == 1
        nursery.run(script.format("'--minutes', '0.05'"), tmp_path)
    decisions = read_lines(tmp_path / "x.jsonl")
    assert [each["chunk"] for each in decisions] == list(range(12))
    frames = imageio.imread(tmp_path / "x.mp4")
    assert len(frames) == 36
    backgrounds = [np.median(frames[at], axis=(0, 1)) for at in (11, 23, 35)]  # blue, yellow, white
    assert np.abs(backgrounds[1] - backgrounds[0]).max() > 60 and np.abs(backgrounds[2] - backgrounds[1]).max() > 60


# Killed, and side by side


def start_child(jobs, checkpoint, resume=False, die_at=0):
    """
    A process, forked because imports take seconds, that generates what is missing; its id.

    Args:
        die_at (`int`): at which of its steps SIGKILL comes: whenever it opens, renames or removes a file of `jobs`, or
            runs ffmpeg. 0: never.
    """
    pid = os.fork()
    if pid:
        return pid
    code, steps, folder = 3, itertools.count(1), str(jobs[0].path.parent)

    def die(event, arguments):
        touches = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and folder in str(arguments[0])
        if (touches or event == "subprocess.Popen") and next(steps) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        generate.load_pipeline = lambda *_: full_pipeline(FlowMatchLCMScheduler(shift=5.0))
        sys.addaudithook(die)
        code = generate.generate_missing(jobs, str(checkpoint), save_every=1, resume=resume)
    finally:
        os._exit(code)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("resume", [False, True])
def test_generate_killed_at_any_step_keeps_whole_videos_and_finishes_later(resume, here):
    def jobs(name):
        settings = {"num_frames": 21, "window_size": 9, "num_videos_per_prompt": 2}
        return [Job(PROMPTS[0], 3, here / name / "x.mp4", settings, here / name / "run" if resume else None)]

    assert ended(start_child(jobs("whole"), here / "checkpoint")) == 0
    step, codes = 1, []
    while 0 not in codes:
        codes.append(ended(start_child(jobs("cut"), here / "checkpoint", resume, step)))
        for path in (here / "cut").glob("x-?.mp4"):
            verify(path, [9, 12])
            assert json.loads(path.with_suffix(".json").read_text())["seed"] == 3
        step += 5
    assert set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 6
    assert contents(here / "cut") == contents(here / "whole")


def test_two_processes_on_one_folder_make_each_video_once(here):
    settings = {"num_frames": 21, "window_size": 9}
    jobs = [Job(prompt, seed, here / "out" / f"{seed}.mp4", settings) for seed, prompt in enumerate(PROMPTS[:1] * 3)]
    assert [ended(pid) for pid in [start_child(jobs, here / "checkpoint") for _ in range(2)]] == [0, 0]
    assert sorted(contents(here / "out")) == sorted(
        f"{n}.{kind}" for n in range(3) for kind in ("json", "jsonl", "mp4")
    )
    for job in jobs:
        verify(job.path, [9, 12])


def test_full_disk_is_reported_and_retried(here, capfd):
    def job(name):
        return Job(PROMPTS[0], 0, here / name / "x.mp4", {"num_frames": 69, "window_size": 9})

    assert ended(start_child([job("whole")], here / "checkpoint")) == 0
    whole, limits = (here / "whole" / "x.mp4").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(whole) > 2**13  # what a start asks for, and more
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 100, limits[1]))
    try:
        assert ended(start_child([job("cut")], here / "checkpoint")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "x.mp4: OSError" in (said := capfd.readouterr().err) and "File too large" in said
    assert sorted(contents(here / "cut")) == ["x.growing.jsonl", "x.growing.mp4"]
    assert play(here / "cut" / "x.growing.mp4") == 57
    assert ended(start_child([job("cut")], here / "checkpoint")) == 0
    assert (here / "cut" / "x.mp4").read_bytes() == whole


def test_seeds_do_not_depend_on_the_number_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    jobs, _ = read_jobs(tmp_path / "prompts.txt", tmp_path, 5, {})
    assert [(job.seed, job.path.stem) for job in jobs] == list(zip((5, 7, 8), NAMES))


def test_empty_prompt_lines_are_reported(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\r\n---\r\nein grüner Kreis\u2028mit Rand\r\n".encode())
    jobs, note = read_jobs(file, tmp_path, 0, {})
    assert [job.prompt for job in jobs] == ["a red circle", "ein grüner Kreis\u2028mit Rand"]
    assert [job.path.stem for job in jobs] == ["00000-a-red-circle", "00003-ein-grüner-kreis-mit-rand"]
    assert note == f"{file}: no video for the lines without a word, counted from 0: 1, 2 ('---')"
    file.write_text("\U00020000" * 100)  # four bytes each
    assert len(read_jobs(file, tmp_path, 0, {})[0][0].path.name.encode()) < 200
    for content, message in (
        (b"", "no line has a word"),
        (b"\n!\n", "no line has a word"),
        (b"a\xff", "byte 1 is none"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"prompts.txt must .*{message}"):
            read_jobs(file, tmp_path, 0, {})


JOB = Job("a red circle", 3, Path("x.mp4"), {"prune_fraction": 0.1, "prompt_schedule": {4: "a blue circle"}})


@pytest.mark.parametrize(
    "other, different",
    [
        ({}, None),
        ({"job": JOB._replace(prompt="a green circle")}, "prompt 'a red circle', not 'a green circle'"),
        ({"job": JOB._replace(seed=4)}, "seed 3, not 4"),
        (
            {"job": JOB._replace(settings={"prune_fraction": 0.2})},
            "prune_fraction 0.1, not 0.2; prompt_schedule {'4': 'a ",
        ),
        ({"fps": 8}, "fps 16, not 8"),
        ({"dtype": "bfloat16"}, "dtype 'float32', not 'bfloat16'"),
        ({"weights": "b"}, "weights 'a', not 'b'"),
        ({"checkpoint": "moved"}, None),
    ],
    ids=str,
)
def test_finished_video_of_another_call_raises(other, different, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {"job": JOB, "fps": 16, "dtype": "float32", "checkpoint": "world", "weights": "a"}
    write_record(Path("x.json"), make_record(**made))
    Path("x.mp4").touch()
    if different is None:
        assert check_records([JOB], [make_record(**{**made, **other})]) is None
    else:
        with pytest.raises(ValueError, match=f"x.mp4 is there already, but is another video: {re.escape(different)}"):
            check_records([JOB], [make_record(**{**made, **other})])
    monkeypatch.setattr("tokentrim.tools.records.__version__", "9")
    assert "1 of them by version 0" in check_records([JOB], [make_record(**made)])
    Path("x.json").unlink()
    with pytest.raises(ValueError, match="no x.json beside it"):
        check_records([JOB], [make_record(**made)])


def test_fingerprint_distinguishes_checkpoints(here):
    folder = here / "checkpoint"
    ours = fingerprint_folder(folder)
    shutil.copytree(folder, here / "copy")
    (here / "copy" / "README.md").write_text("a card")
    assert fingerprint_folder(here / "copy") == ours
    for name in ("model_index.json", "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        assert fingerprint_folder(folder) != ours
        (folder / name).write_bytes(content)


def test_unwritable_output_is_reported_before_loading(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "model_index.json").write_text("{}")
    for out, message in (
        ("file/x.mp4", "--out: .*file cannot be written"),
        ("folder.mp4", "--out: .*folder.mp4 is a folder"),
        ("world/model_index.mp4", "--out must be a new file or one that this command wrote"),
    ):
        assert main(["generate", "a prompt", "--out", str(tmp_path / out), *SHARED]) == 1
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"output_type": "latent"}, "`output_type` must be one of np, pt, pil, but is 'latent'"),
        ({"num_frame": 9}, "`config` must be arguments of the call, .*num_frames, .* but is 'num_frame'"),
        ({"generator": 3}, "`config` must be .*but is 'generator'"),
        ({"num_videos_per_prompt": 0}, "`num_videos_per_prompt` must be an int >= 1, but is 0"),
        ({"num_videos_per_prompt": "2"}, "`num_videos_per_prompt` must be an int >= 1, but is '2'"),
    ],
    ids=str,
)
def test_invalid_configs_are_reported_at_once(settings, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    out = ["--out", str(tmp_path / "x.mp4"), "--config", str(tmp_path / "config.json")]
    assert main(["generate", "a prompt", *out, *SHARED]) == 1
    assert re.fullmatch(f"tokentrim generate: error: {message}\\.\n", capsys.readouterr().err)


def test_later_settings_override_earlier_ones(here):
    settings = read_settings([here / "rollout.json", here / "trim.json"])
    assert settings == {"window_size": 9, "num_frames": 33, "drift_sensitivity": 0.0, "warmup_chunks": 1}
    (here / "trim.json").write_text("\ufeff{}")
    read_settings([here / "trim.json"])
    for content in ("[]", "[1]", "{"):
        (here / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json must hold one JSON object"):
            read_settings([here / "bad.json"])


def test_schedule_keys_are_chunks(here):
    (here / "schedule.json").write_text('{"4": "a", "20": "b"}')
    assert read_schedule(here / "schedule.json") == {4: "a", 20: "b"}
    for content in ('["a"]', '{"four": "a"}', "{"):
        (here / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json must hold one JSON object of chunks and prompts"):
            read_schedule(here / "bad.json")


SHARED = ["--checkpoint", "nowhere"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a prompt", "--out", "videos", *SHARED], "--out must end with .mp4 for one prompt, but is 'videos'"),
        (["a prompt", "--prompts", "prompts.txt", "--out", "videos", *SHARED], "not allowed with"),
        (["--out", "a.mp4", *SHARED], "a PROMPT or --prompts is required"),
        (["a prompt", "--out", "a.mp4"], "required: --checkpoint"),
        (["a prompt", *SHARED], "required: --out"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--num-frames", "-1"], "--num-frames"),
        (
            ["a prompt", "--out", "a.mp4", *SHARED, "--num-frames", "x"],
            "a number of frames, 0 or `endless`, but is 'x'",
        ),
        (["a prompt", "--out", "a.mp4", *SHARED, "--method", "{x"], "must be a name or JSON, but is '{x'"),
        (
            ["a prompt", "--out", "a.mp4", *SHARED, "--fps", "0"],
            "--fps: must be a number from 0.01 to 1000, but is '0'",
        ),
        (
            ["a prompt", "--out", "a.mp4", *SHARED, "--save-every", "0"],
            "--save-every: must be an int >= 1, but is '0'",
        ),
        (["--prompts", "a.txt", "--out", "a.mp4", *SHARED], "--out must be a folder for --prompts, but is 'a.mp4'"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--prompt-transition", "jump"], "--prompt-transition"),
        (["--resume"], "--resume needs --state-dir"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--method", "none"], "--method must be one of plain, tokentrim, "),
        (
            ["a prompt", "--out", "a.mp4", *SHARED, "--method", '["tokentrim", "tokentrim_pus"]'],
            "did you mean tokentrim_p",
        ),
        (
            ["a prompt", "--out", "a.mp4", *SHARED, "--method", '{"reanchor": {"strenght": 1}}'],
            "did you mean strength?",
        ),
        (["a prompt", "--out", "a.mp4", *SHARED, "--layout", "mem_rope"], "did you mean memrope?"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--layout", '{"window": {}, "tame": {}}'], "a dict of one layout"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--layout", '{"memrope": {"window": 3}}'], "a setting of memrope"),
        ([" \n", "--out", "a.mp4", *SHARED], "PROMPT must have a word"),
        (["a prompt", "--out", "a.gif", *SHARED], "--out must end with .mp4"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--height", "-16"], "--height: must be an int >= 1, but is '-16'"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--steps", "2.5"], "--steps: must be an int >= 1, but is '2.5'"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--guidance-scale", "nan"], "--guidance-scale: must be a finite"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--seed", "-1"], "--seed: must be an int from 0"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--device", "gpu"], "--device: must be cpu, cuda"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--offload", "all"], "--offload"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--image", "a.png", "--video", "a.mp4"], "do not go together"),
        (["a prompt", "--out", "a.mp4", *SHARED, "--negative-prompt", "blue", "--guidance-scale", "1"], "above 1"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["generate", *arguments])
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1


def test_options_override_files(here, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr("tokentrim.tools.generate.generate_missing", lambda listed, *_, **__: jobs.extend(listed) or 0)
    (here / "method.json").write_text(json.dumps({"method": "paper", "num_frames": 33, "window_size": 9}))
    shared = ["generate", "a prompt", "--out", "a.mp4", "--checkpoint", str(here / "checkpoint")]
    shared += ["--config", str(here / "method.json")]
    more = ["--method", "plain", "--num-frames", "9", "--steps", "2", "--height", "32", "--width", "48"]
    assert main([*shared, *more, "--guidance-scale", "3", "--negative-prompt", "blue"]) == 0
    assert main(shared) == 0
    video = {"num_inference_steps": 2, "height": 32, "width": 48, "guidance_scale": 3.0, "negative_prompt": "blue"}
    assert [job.settings for job in jobs] == [
        {"method": "plain", "num_frames": 9, "window_size": 9, **video},
        {"method": "paper", "num_frames": 33, "window_size": 9},
    ]
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"{Path.cwd() / 'a.mp4'}: 9 frames (0.6 s), method plain, checkpoint ")


def test_missing_files_are_reported(tmp_path, capsys):
    none = str(tmp_path / "none")
    assert main(["generate", "--state-dir", none, "--resume"]) == 1
    assert f"must be the folder of a run to resume, but {none} does not exist" in capsys.readouterr().err
    one = ["a prompt", "--out", "a.mp4"]
    for option, arguments in (
        ("--prompts", ["--out", "videos"]),
        *((option, one) for option in ("--config", "--image", "--video", "--prompt-schedule")),
    ):
        assert main(["generate", *arguments, option, none, *SHARED]) == 1
        assert f"error: {option} must be a file, but {none} does not exist.\n" in capsys.readouterr().err
