"""Loading, as strangers do it: in fresh processes, from files, without the network."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import (
    full_pipeline,
    generators,
    quiet,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
)
from conftest import ROOT
from diffusers import (
    AnyFlowFARPipeline,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from huggingface_hub import ModelCard

import tokentrim
from tokentrim import TokenTrimPipeline
from tokentrim.bundle import bundle


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


def run_fresh(script, tmp_path, *arguments, **variables):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        **variables,
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


def test_the_directory_entry_names_the_pipeline_and_every_sibling():
    names = [module for _, module in relative_imports("pipeline")[0]]
    assert sorted(names) == sorted(["pipeline_tokentrim", *SIBLINGS]) == sorted(relative_imports("pipeline")[1])


def test_what_only_looking_at_a_run_needs_is_not_imported_by_the_loader():
    """It imports whatever an import statement names, inside functions too, and warns of what is missing."""
    for name in ("pipeline_tokentrim", *SIBLINGS):
        assert not re.search(r"^\s*(from|import)\s+(matplotlib|imageio)", (ROOT / f"{name}.py").read_text(), re.M)


def test_every_export_is_there():
    for name in tokentrim.__all__:
        assert getattr(tokentrim, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        tokentrim.no_such_name  # noqa: B018


# In this process: `from tokentrim import TokenTrimPipeline`


def wan_parts(scheduler):
    return (tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), scheduler, tiny_transformer())


def wan_pipeline():
    settings = {"flow_shift": 5.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return quiet(WanPipeline(*wan_parts(UniPCMultistepScheduler(**settings))))


def latents(pipe, **kwargs):
    size = {"height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": 2}
    return quiet(pipe)(PROMPT, generator=generators(0), output_type="latent", **size, **CALL, **kwargs).frames


def test_from_pipe():
    """Components are shared, the scheduler is lifted beside the other pipeline's own, settings are arguments."""
    wan = wan_pipeline()
    pipe = TokenTrimPipeline.from_pipe(wan, **SETTINGS)
    assert pipe.transformer is wan.transformer and pipe.vae is wan.vae and pipe.text_encoder is wan.text_encoder
    assert type(pipe.scheduler).__name__ == "TokenTrimUniPCMultistepScheduler"
    assert pipe.scheduler.config.flow_shift == 5.0 and pipe.config.window_size == 9
    assert type(wan.scheduler) is UniPCMultistepScheduler
    ours = full_pipeline(UniPCMultistepScheduler.from_config(wan.scheduler.config), **SETTINGS)
    assert latents(pipe).equal(latents(ours))

    tokenizer, text_encoder, vae, scheduler, transformer = wan_parts(FlowMatchEulerDiscreteScheduler(shift=5.0))
    far = AnyFlowFARPipeline(tokenizer, text_encoder, transformer, vae, scheduler)
    assert latents(TokenTrimPipeline.from_pipe(far, **SETTINGS)).equal(latents(full_pipeline(**SETTINGS)))


def test_a_plain_wan_folder(tmp_path):
    """Its scheduler's shift is kept; the transformer may be replaced by a causal one."""
    wan_pipeline().save_pretrained(tmp_path)
    other = tiny_transformer(seed=1)
    pipe = TokenTrimPipeline.from_pretrained(tmp_path, transformer=other, **SETTINGS)
    assert pipe.transformer is other and pipe.scheduler.config.flow_shift == 5.0 and pipe.config.window_size == 9
    wan = wan_pipeline()
    wan.transformer = other
    assert latents(pipe).equal(latents(TokenTrimPipeline.from_pipe(wan, **SETTINGS)))


def test_lifting_a_scheduler_is_logged(caplog):
    with caplog.at_level("INFO", logger="tokentrim"):
        TokenTrimPipeline(None, None, tiny_transformer(), None, FlowMatchEulerDiscreteScheduler())
    assert [record.getMessage() for record in caplog.records] == [
        "scheduler FlowMatchEulerDiscreteScheduler: lifted to TokenTrimFlowMatchEulerDiscreteScheduler, with its config"
    ]


def test_a_checkpoint_of_another_family():
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    with pytest.raises(ValueError, match="`vae` has to be an AutoencoderKLWan, .*but is 'AutoencoderKL'"):
        TokenTrimPipeline(None, None, tiny_transformer(), vae, None)


def test_saving_with_and_without_code(tmp_path):
    """Stock names without; with code, it is where the loader looks, and saving again keeps naming it."""
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0), **SETTINGS)

    def save(name, **kwargs):
        pipe.save_pretrained(tmp_path / name, **kwargs)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert {setting: index[setting] for setting in SETTINGS} == SETTINGS
        return index["_class_name"], index["scheduler"]

    stock = "AnyFlowFARPipeline", ["diffusers", "FlowMatchLCMScheduler"]
    ours = ["pipeline_tokentrim", "TokenTrimPipeline"], ["tokentrim_scheduler", "TokenTrimFlowMatchLCMScheduler"]
    assert save("stock") == stock and not list((tmp_path / "stock").rglob("*.py"))
    assert save("ours", include_code=True) == ours and save("ours") == ours
    files = {str(path.relative_to(tmp_path / "ours")) for path in (tmp_path / "ours").rglob("*.py")}
    code = {f"{name}.py" for name in ("pipeline_tokentrim", *SIBLINGS)}
    assert files == code | {"scheduler/tokentrim_scheduler.py"}

    pipe.scheduler = tokentrim.lift_scheduler(FlowMatchHeunDiscreteScheduler(shift=5.0))  # into a class of no file
    assert save("heun", include_code=True) == (ours[0], ["diffusers", "FlowMatchHeunDiscreteScheduler"])


def test_pushing_with_code(tmp_path, monkeypatch):
    """The folder is complete when Diffusers uploads it."""
    uploaded = {}

    def upload(pipe, folder, *_, **__):
        uploaded.update(json.loads((Path(folder) / "model_index.json").read_text()))
        uploaded["files"] = {path.name for path in Path(folder).iterdir()}

    pipeline_utils = "diffusers.pipelines.pipeline_utils"
    monkeypatch.setattr(f"{pipeline_utils}.create_repo", lambda *_, **__: SimpleNamespace(repo_id="you/both"))
    monkeypatch.setattr(f"{pipeline_utils}.load_or_create_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    monkeypatch.setattr(TokenTrimPipeline, "_upload_folder", upload)
    full_pipeline().save_pretrained(str(tmp_path), include_code=True, push_to_hub=True)
    assert uploaded["_class_name"] == ["pipeline_tokentrim", "TokenTrimPipeline"]
    assert {f"{name}.py" for name in ("pipeline_tokentrim", *SIBLINGS)} < uploaded["files"]


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


def test_the_loading_matrix(checkpoint, tmp_path):
    """Every way in from files makes the same latents, without a word of warning, and says what to do where it cannot.

    Between the cells everything is forgotten that Diffusers remembers of code.
    """
    folder, _ = checkpoint
    TokenTrimPipeline.from_pretrained(folder).save_pretrained(tmp_path / "with-code", include_code=True)
    wan_pipeline().save_pretrained(tmp_path / "wan")
    (tmp_path / "tokentrim_bundle.py").write_text(bundle())
    script = (
        (
            LOAD
            + """
import importlib, logging, os, shutil
import diffusers
from diffusers import AnyFlowFARPipeline, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline
from diffusers.utils import dynamic_modules_utils, logging as diffusers_logging

folder, file, root = sys.argv[1:]
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
diffusers_logging.add_handler(handler)
diffusers_logging.disable_default_handler()

def forget():
    shutil.rmtree(dynamic_modules_utils.HF_MODULES_CACHE + "/diffusers_modules", ignore_errors=True)
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    records.clear()

def latents(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(0)]
    return pipe(PROMPT, generator=generator, output_type="latent", **CALL, **kwargs).frames

def from_pretrained(folder, **kwargs):
    forget()
    return DiffusionPipeline.from_pretrained(folder, **kwargs)

code = {"custom_pipeline": file, "trust_remote_code": True}
expected = latents(from_pretrained(folder, **code))
assert not records, records

def check(pipe, pipeline="TokenTrimPipeline", scheduler="TokenTrimFlowMatchLCMScheduler", **kwargs):
    assert not records, records
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == (pipeline, scheduler)
    assert latents(pipe, **kwargs).equal(expected)

# The directory, also as "."; one file of everything
check(from_pretrained(folder, custom_pipeline=root, trust_remote_code=True))
here = os.getcwd()
os.chdir(root)
check(from_pretrained(folder, custom_pipeline=".", trust_remote_code=True))
os.chdir(here)
bundled = from_pretrained(folder, custom_pipeline="tokentrim_bundle.py", trust_remote_code=True)
check(bundled)
bundled.save_pretrained("with-bundle", include_code=True)

# A checkpoint that holds the code, and what each kind of pipeline saves with its code
check(from_pretrained("with-code", trust_remote_code=True))
check(from_pretrained("with-bundle", trust_remote_code=True))
pipe = from_pretrained("with-code", trust_remote_code=True)
pipe.save_pretrained("with-code-again", include_code=True)
check(from_pretrained("with-code-again", trust_remote_code=True))
pipe.save_pretrained("without-code")
check(from_pretrained("without-code", **code))

# From pipelines in memory, and a plain Wan folder with another transformer
settings = {"window_size": 9, "num_sink_frames": 3, "relative_positions": True}
size = {"height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": 2}
far = AnyFlowFARPipeline.from_pretrained(folder)
forget()
pipe = DiffusionPipeline.from_pipe(far, **code, **settings)
records.clear()  # `from_pipe` casts, and warns of it, whatever the pipeline
check(pipe, **size)
wan = WanPipeline.from_pretrained("wan")
forget()
pipe = DiffusionPipeline.from_pipe(wan, **code, **settings)
expected = latents(pipe, **size)
pipe = from_pretrained("wan", transformer=far.transformer, **code, **settings)
check(pipe, scheduler="TokenTrimUniPCMultistepScheduler", **size)
assert pipe.scheduler.config.flow_shift == 5.0 and pipe.transformer is far.transformer

# What cannot be
def message(error, *args, **kwargs):
    try:
        from_pretrained(*args, **kwargs)
    except error as raised:
        return str(raised)
    raise AssertionError(f"{args}, {kwargs} loads")

for arguments in ((folder, {"custom_pipeline": file}), (folder, {"custom_pipeline": root}), ("with-code", {})):
    assert "Pass `trust_remote_code=True`" in message(ValueError, arguments[0], **arguments[1])
vars(diffusers).pop("AnyFlowFARPipeline", None)
diffusers._class_to_module.pop("AnyFlowFARPipeline")  # as before 0.39.0
assert "needs diffusers 0.39.0 or newer" in message(ImportError, folder, **code)
"""
        )
        .replace("PROMPT", repr(PROMPT))
        .replace("**CALL", f"**{CALL!r}")
    )
    run_fresh(script, tmp_path, folder, ROOT / "pipeline_tokentrim.py", ROOT)
