"""Loading, as strangers do it: in fresh processes, from files, without the network."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from builders import full_pipeline, generators
from conftest import ROOT
from diffusers import FlowMatchLCMScheduler

import tokentrim


SIBLINGS = sorted(path.stem for path in ROOT.glob("tokentrim_*.py"))
SETTINGS = {"window_size": 9, "num_sink_frames": 3, "relative_positions": True}
CALL = {"num_frames": 45, "drift_sensitivity": 0.0}
PROMPT = "a red circle moving right over a blue background"

LOAD = f"""
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)

def load(folder, custom_pipeline):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=custom_pipeline, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def generate(pipe):
    return pipe({PROMPT!r}, generator=[torch.Generator().manual_seed(0)], **{CALL!r})
"""


def run_fresh(script, tmp_path, *arguments):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.fixture
def checkpoint(tmp_path):
    """A saved pipeline, and the video that it makes."""
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0), **SETTINGS)
    folder = tmp_path / "checkpoint"
    pipe.save_pretrained(folder)
    return folder, pipe(PROMPT, generator=generators(0), **CALL)


# What the sources have to look like for Diffusers' loader


def relative_imports(name):
    """Modules that a file imports from its own package, by `ast` and as Diffusers finds them."""
    source = (ROOT / f"{name}.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    found = re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
    found += re.findall(r"^\s*import\s+\.(\S+)\s*$", source, flags=re.MULTILINE)
    return [(node.level, node.module) for node in nodes], found


@pytest.mark.parametrize("name", ["pipeline_tokentrim", *SIBLINGS])
def test_relative_imports_are_seen_by_the_loader_and_named_by_the_pipeline(name):
    imported, found = relative_imports(name)
    assert sorted(imported) == sorted((1, module) for module in found)
    of_pipeline = relative_imports("pipeline_tokentrim")[1]
    assert set(found) <= set(of_pipeline) <= set(SIBLINGS)


def test_the_scheduler_file_stands_alone():
    assert relative_imports("tokentrim_scheduler") == ([], [])


def test_every_export_is_there():
    for name in tokentrim.__all__:
        assert getattr(tokentrim, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        tokentrim.no_such_name  # noqa: B018


# In fresh processes


def test_importing_the_package_loads_nothing(tmp_path):
    (tmp_path / "tokentrim").symlink_to(ROOT)
    run_fresh("import tokentrim, sys; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules", tmp_path)


def test_custom_pipeline_from_a_file(checkpoint, tmp_path):
    """Settings and lifted scheduler included; what it saves loads again, with and without this project."""
    folder, expected = checkpoint
    script = (
        LOAD
        + """
pipe = load(sys.argv[1], sys.argv[2])
output = generate(pipe)
assert type(pipe).__name__ == "TokenTrimPipeline" and type(pipe.scheduler).__name__ == "TokenTrimFlowMatchLCMScheduler"
np.save("frames.npy", output.frames)
print([d["trim"] for d in output.decisions[0]])

pipe.save_pretrained("saved")
again = load("saved", sys.argv[2])
assert np.abs(generate(again).frames - output.frames).max() < 1e-5
stock = DiffusionPipeline.from_pretrained("saved")
assert type(stock).__name__ == "AnyFlowFARPipeline" and type(stock.scheduler).__name__ == "FlowMatchLCMScheduler"
assert stock.scheduler.config.shift == 5.0
"""
    )
    printed = run_fresh(script, tmp_path, folder, ROOT / "pipeline_tokentrim.py")
    np.testing.assert_allclose(np.load(tmp_path / "frames.npy"), expected.frames, atol=1e-4)
    assert ast.literal_eval(printed) == [decision["trim"] for decision in expected.decisions[0]]


def test_code_and_schedulers_inside_a_checkpoint(checkpoint, tmp_path):
    """Pipeline and siblings at its root, the scheduler's file in its folder: each class loads alone and is kept."""
    folder, expected = checkpoint
    for name in ("pipeline_tokentrim", *SIBLINGS):
        shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(ROOT / "tokentrim_scheduler.py", folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    configs = {
        "TokenTrimFlowMatchLCMScheduler": {"shift": 5.0},
        "TokenTrimFlowMatchEulerDiscreteScheduler": {"shift": 5.0},
        "TokenTrimFlowMapEulerDiscreteScheduler": {"shift": 5.0},
        "TokenTrimUniPCMultistepScheduler": {
            "flow_shift": 5.0,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        },
    }
    for scheduler, config in configs.items():
        variant = tmp_path / scheduler
        shutil.copytree(folder, variant)
        index["scheduler"] = ["tokentrim_scheduler", scheduler]
        (variant / "model_index.json").write_text(json.dumps(index))
        (variant / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    script = (
        LOAD
        + """
for scheduler in sys.argv[1:]:
    pipe = load(scheduler, "pipeline_tokentrim")
    assert type(pipe.scheduler).__name__ == scheduler
    assert 5.0 in (pipe.scheduler.config.get("shift"), pipe.scheduler.config.get("flow_shift"))
    np.save(scheduler + ".npy", generate(pipe).frames)
    pipe.scheduler.save_pretrained("saved")
    again = type(pipe.scheduler).from_pretrained("saved")
    ours, theirs = ({k: v for k, v in each.config.items() if k[0] != "_"} for each in (again, pipe.scheduler))
    assert ours == theirs
"""
    )
    run_fresh(script, tmp_path, *configs)
    for scheduler, config in configs.items():
        pipe = full_pipeline(getattr(tokentrim, scheduler)(**config), **SETTINGS)
        ours = pipe(PROMPT, generator=generators(0), **CALL).frames
        np.testing.assert_allclose(np.load(tmp_path / f"{scheduler}.npy"), ours, atol=1e-4)
