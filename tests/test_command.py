"""What `tokentrim` refuses before PyTorch is imported, and that nothing is replaced and no code runs unasked."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from tokentrim.tools import checkpoints, given, memory
from tokentrim.tools.cli import main
from tokentrim.tools.loading import load_checkpoint, load_without_weights
from tokentrim.tools.runs import RUN, own_run, read_run


WORLD = ROOT / "checkpoints" / "tiny-world"
PROMPT = "a red circle moving right over a blue background"
SHARED = ["generate", PROMPT, "--checkpoint", str(WORLD), "--out"]


def start(folder, *arguments):
    """In a process of its own, with the checkout as the package `tokentrim`."""
    (folder / "path").mkdir(exist_ok=True)
    if not (folder / "path" / "tokentrim").exists():
        (folder / "path" / "tokentrim").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": str(folder / "path"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


WRONG = [
    ["generate", PROMPT, "--checkpoint", "nowhere", "--out", "x.mp4"],
    ["generate", PROMPT, "--checkpoint", "you/nowhere", "--out", "x.mp4"],
    [*SHARED, "x.gif"],
    [*SHARED, "x.mp4", "--layout", "mem_rope"],
    [*SHARED, "x.mp4", "--method", "tokentrim2"],
    [*SHARED, "x.mp4", "--height", "65"],
    [*SHARED, "x.mp4", "--negative-prompt", "a ring"],
    [*SHARED, "x.mp4", "--negative-prompt", "a ring", "--guidance-scale", "0"],
    [*SHARED, "x.mp4", "--config", "none.json"],
    [*SHARED, "x.mp4", "--config", "bad.json"],
    [*SHARED, "bad.mp4"],
    ["generate", " ", "--checkpoint", str(WORLD), "--out", "x.mp4"],
    ["generate", "--resume", "--state-dir", "none"],
    ["convert", "none.pt", "--base", ".", "--out", "new", "--preset", "self_forcing"],
    ["convert", "bad.json", "--base", ".", "--out", ".", "--preset", "self_forcing"],
    ["doctor", "nowhere"],
    ["doctor", str(WORLD), "--height", "65"],
    ["publish", "you/name", "--out", "."],
    ["bundle", "x.txt"],
    ["drift", "bad.json", "--plot", "missing/x.png"],
    ["drift", "bad.json", "--csv", "bad.json"],
    ["compare", "nowhere", "--out", "new"],
    ["compare", str(WORLD), "--out", "bad.json"],
    ["compare", str(WORLD), "--out", "."],
    ["compare", str(WORLD), "--out", "new", "--methods", "plain", "magic"],
    ["compare", str(WORLD), "--out", "new", "--plan", "bad.json"],
    ["compare", str(WORLD), "--out", "new", "--prompts", "none.txt"],
]


def test_wrong_calls_are_told_in_one_line_without_pytorch(tmp_path):
    (tmp_path / "bad.json").write_text('{"num_frame": 9}')
    script = f"""
import contextlib, io, sys
from tokentrim.tools.cli import main
for arguments in {WRONG}:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = main(arguments)
    except SystemExit as end:
        code = end.code
    print(code, said.getvalue().count("\\n"), said.getvalue().strip())
    assert "torch" not in sys.modules and "diffusers" not in sys.modules, arguments
"""
    process = start(tmp_path, "-c", script)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == len(WRONG)
    for line, arguments in zip(lines, WRONG):
        code, num_lines, said = line.split(" ", 2)
        assert code in "12" and num_lines == "1", line
        assert said.startswith(f"tokentrim {arguments[0]}: error: ") and "Errno" not in said, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "path"]  # nothing was written


def test_the_first_line_comes_before_pytorch_is_imported(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "tokentrim").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    command = [sys.executable, "-X", "importtime", "-m", "tokentrim", *SHARED, "x.mp4", "--num-frames", "6"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    imported = []
    while (line := process.stderr.readline()).startswith("import time:"):
        imported.append(line.rsplit("|", 1)[1].strip())
    process.kill()
    process.communicate()
    assert line == f"{tmp_path / 'x.mp4'}: 6 frames (0.5 s), method tokentrim_plus, checkpoint {WORLD}\n"
    assert "argparse" in imported and not any(name.split(".")[0] in ("torch", "diffusers") for name in imported)


# Nothing is replaced


@pytest.mark.parametrize(
    "name, options",
    [
        ("fox.json", ["--config"]),
        ("fox.json", []),
        ("fox.jsonl", []),
        ("fox.growing.jsonl", []),
        ("fox.growing.json", ["--config"]),
        ("fox.growing.mp4", ["--config"]),
        ("fox.jsonl", ["--prompt-schedule"]),
    ],
)
def test_files_beside_the_video_that_are_the_users(name, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = '{"5": "a green circle"}' if "--prompt-schedule" in options else '{"num_inference_steps": 1}'
    (tmp_path / name).write_text(content)
    options = [each for option in options for each in (option, name)]
    assert main([*SHARED, "fox.mp4", "--num-frames", "6", *options]) == 1
    assert "--out must " in (said := capsys.readouterr().err) and name in said
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_a_record_that_is_given_as_settings_is_not_replaced(tmp_path, monkeypatch, capsys):
    """What a .json beside a video looks like, under another name for the same file."""
    monkeypatch.chdir(tmp_path)
    record = {"prompt": "a", "seed": 0, "arguments": {}, "weights": "w"}
    (tmp_path / "fox.json").write_text(json.dumps(record))
    os.link("fox.json", "settings.json")
    (tmp_path / "settings.json").write_text("{}")
    assert main([*SHARED, "fox.mp4", "--config", "settings.json"]) == 1
    assert "--out must not be an input, but " in capsys.readouterr().err


def test_a_foreign_run_writes_over_nothing(tmp_path, capsys):
    """The folder of a run that came from elsewhere names files, options and what code to trust."""
    run, out = tmp_path / "run", tmp_path / "mine.mp4"
    run.mkdir()
    (tmp_path / "mine.jsonl").write_text('{"text": "training data"}\n')
    begun = {"prompt": "a red circle", "out": str(out), "checkpoint": str(WORLD), "config": []}
    (run / RUN).write_text(json.dumps(begun))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["generate", "--resume", "--state-dir", str(run)]) == 1
    assert "--out must be a new file or one that this command wrote" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "3",
        '{"out": 3}',
        '{"config": "x"}',
        '{"config": [3]}',
        '{"seed": "3"}',
        '{"seed": true}',
        '{"trust_remote_code": true}',
    ],
)
def test_damaged_options_of_a_run(content, tmp_path):
    (tmp_path / RUN).write_text(content)
    with pytest.raises(ValueError, match=f"--state-dir: .*{RUN} is damaged"):
        read_run(tmp_path)


def test_one_command_for_a_state_folder(tmp_path):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with own_run(tmp_path):
            os.write(writing, b"x")
            time.sleep(60)
    os.read(reading, 1)
    with pytest.raises(OSError, match="--state-dir: .* is in use by another `tokentrim generate`"):
        with own_run(tmp_path):
            pass
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    with own_run(tmp_path):
        pass


# Checkpoints


def test_typos_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("worlds/tiny", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "worlds" / "tiny" / "model_index.json").write_text("{}")
    for checkpoint, message in (
        ("worlds/tiyn", "worlds/tiyn does not exist. Did you mean worlds/tiny?"),
        ("worlds/none", "worlds/none does not exist."),
        ("./worlds", "model_index.json, but worlds has none"),
        ("empty", "model_index.json, but empty has none"),
        ("../a/b", "../a/b does not exist"),
        ("a b/c", "a b/c does not exist"),
        ("", "does not exist|has none"),
        ("you/nowhere", "you/nowhere is neither a folder nor in the cache, and HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises((OSError, ValueError), match=message.replace(".", r"\.").replace("?", r"\?")):
            checkpoints.find_checkpoint(checkpoint)
    assert checkpoints.find_checkpoint("worlds/tiny").name == "tiny"


def copy(tmp_path, **index):
    """A checkpoint whose index says something else."""
    folder = tmp_path / "stranger"
    shutil.copytree(WORLD, folder)
    (folder / "model_index.json").write_text(json.dumps(json.loads((folder / "model_index.json").read_text()) | index))
    return folder


def touching(path, *names):
    """Python that leaves a trace when it runs."""
    return f"from pathlib import Path\nPath({str(path)!r}).touch()\n" + "".join(
        f"\n\nclass {n}:\n    pass\n" for n in names
    )


@pytest.mark.parametrize("part, kind", [("scheduler", "Theirs"), ("transformer", "Theirs"), ("tokenizer", "Theirs")])
def test_code_of_a_part_runs_only_where_it_is_trusted(part, kind, tmp_path):
    folder = copy(tmp_path, **{part: ["theirs", kind]})
    (folder / part / "theirs.py").write_text(touching(tmp_path / "ran", kind))
    with pytest.raises(ValueError, match=f"needs code of its own, {part}/theirs.py.*--trust-remote-code"):
        load_checkpoint(folder, None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("config", ["tokenizer/tokenizer_config.json", "text_encoder/config.json"])
def test_code_that_a_config_names(config, tmp_path):
    """Transformers would ask on the terminal."""
    folder = copy(tmp_path, tokenizer=["transformers", "AutoTokenizer"], text_encoder=["transformers", "AutoModel"])
    settings = json.loads((folder / config).read_text())
    settings["auto_map"] = {"AutoTokenizer": ["theirs.Theirs", None], "AutoModel": "theirs.Theirs"}
    (folder / config).write_text(json.dumps(settings))
    (folder / config).with_name("theirs.py").write_text(touching(tmp_path / "ran", "Theirs"))
    with pytest.raises(ValueError, match="needs code of its own, .*auto_map"):
        load_checkpoint(folder, None)
    assert not (tmp_path / "ran").exists()


def test_the_code_of_a_base_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    from tokentrim.tools.convert import BASE_PARTS, _check_part

    folder = copy(tmp_path)
    for part, kind in (("tokenizer", "AutoTokenizer"), ("text_encoder", "AutoConfig")):
        config = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
        settings = json.loads(config.read_text()) | {"auto_map": {kind: "theirs.Theirs"}, "model_type": "theirs"}
        config.write_text(json.dumps(settings | ({"tokenizer_class": "Theirs"} if part == "tokenizer" else {})))
        (folder / part / "theirs.py").write_text(touching(tmp_path / "ran", "Theirs"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    for part in BASE_PARTS:
        if part == "vae":
            _check_part(folder, part)
        else:
            with pytest.raises(ValueError, match="`base` must be a complete folder, but .* does not load"):
                _check_part(folder, part)
    assert not (tmp_path / "ran").exists()


def test_the_code_of_a_pipeline_is_left_alone(tmp_path):
    """A folder that `publish` or `save_pretrained(include_code=True)` wrote, or a stranger."""
    folder = copy(tmp_path, _class_name=["pipeline_theirs", "TokenTrimPipeline"])
    for name in ("pipeline_theirs.py", "pipeline.py"):
        (folder / name).write_text(touching(tmp_path / "ran", "TokenTrimPipeline"))
    pipe = load_checkpoint(folder, None)
    assert type(pipe).__module__ == "tokentrim.pipeline_tokentrim" and pipe.fps == 12
    assert not (tmp_path / "ran").exists()


def test_code_of_another_project_in_the_folder_is_not_replaced(tmp_path):
    pipe = load_checkpoint(WORLD, None)
    (tmp_path / "pipeline_tokentrim.py").write_text("# mine\n")
    with pytest.raises(ValueError, match="`save_directory` must be a new file or one file of code that this project"):
        pipe.save_pretrained(tmp_path, include_code=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline_tokentrim.py"]
    assert (tmp_path / "pipeline_tokentrim.py").read_text() == "# mine\n"


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("model_index.json", {"fps": "fast"}, "`fps` must be a number from 0.01 to 1000, but is 'fast'"),
        ("model_index.json", {"transformer": []}, "has no transformer"),
        ("model_index.json", {"scheduler": None}, "has no scheduler"),
        ("transformer/config.json", {"patch_size": [1, 2]}, "has other sizes: None"),
        ("transformer/config.json", {"num_layers": "two"}, "has other sizes: 'two'"),
        ("transformer/config.json", {"attention_head_dim": 0}, "has other sizes: 0"),
        ("vae/config.json", {"scale_factor_spatial": 0.5}, "has other sizes: 0.5"),
        ("transformer/config.json", "[1]", "must hold one JSON object"),
        ("model_index.json", "{" * 10**5, "is damaged"),
        ("vae/config.json", b"\xff", "VALUE|damaged|unreadable|readable"),
    ],
    ids=str,
)
def test_damaged_checkpoints_are_one_line(file, changes, message, tmp_path, capsys):
    folder = copy(tmp_path)
    path = folder / file
    if isinstance(changes, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    else:
        path.write_bytes(changes if isinstance(changes, bytes) else changes.encode())
    call = ["generate", PROMPT, "--checkpoint", str(folder), "--num-frames", "6", "--out", str(tmp_path / "x.mp4")]
    assert main(call) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said


def test_a_config_that_hides_its_key(tmp_path):
    folder = copy(tmp_path, tokenizer=["transformers", "AutoTokenizer"])
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{", '{"\\u0061uto_map": {"AutoTokenizer": ["theirs.T", null]},', 1))
    with pytest.raises(ValueError, match="needs code of its own, tokenizer/tokenizer_config.json"):
        load_checkpoint(folder)


def test_arguments_are_checked_without_weights():
    pipe = load_without_weights(WORLD)
    assert {weight.device.type for weight in pipe.transformer.parameters()} == {"meta"}
    pipe.plan(PROMPT)
    with pytest.raises(ValueError, match="`window_size` must be"):
        pipe.plan(PROMPT, window_size=2)


# Memory, and what is given


def test_memory_is_estimated_from_headers():
    weights, cache = memory.estimate_memory(WORLD, {}, "float32")
    files = sum(path.stat().st_size for path in WORLD.rglob("*.safetensors"))
    assert 0.9 * files < weights < 1.1 * files
    assert memory.estimate_memory(WORLD, {"num_videos_per_prompt": 3}, "bfloat16") == (weights // 2, 3 * cache // 2)
    assert memory.estimate_memory(WORLD, {}, "float32", "model")[0] < weights
    assert memory.describe_shortage(weights, cache, weights + cache, "cuda", "none", "bfloat16") is None
    told = memory.describe_shortage(20 * 2**30, 6 * 2**30, 16 * 2**30, "cuda", "none", "float32")
    assert "about 26.0 GiB are needed" in told and "16.0 GiB are free on cuda" in told
    assert "--dtype bfloat16 or --offload model or" in told


def test_a_video_to_continue_ends_with_whole_latent_frames(tmp_path):
    for number in range(50):
        Image.fromarray(np.full((20, 40, 3), 5 * number, np.uint8)).save(tmp_path / f"{number}.png")
    frames = given.read_end(tmp_path, (64, 64), 4)
    assert len(frames) == 33 and {frame.size for frame in frames} == {(64, 64)}
    assert np.asarray(frames[-1])[0, 0, 0] == 245 and np.asarray(frames[0])[0, 0, 0] == 5 * 17
    for number in range(7, 50):
        (tmp_path / f"{number}.png").unlink()
    assert len(given.read_end(tmp_path, (64, 64), 4)) == 5  # of 7
