"""Loading as users do it: in fresh processes, from files and from a Hub, every row of the table in docs/loading.md."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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
from fresh import Nursery
from hub import Hub

import tokentrim
from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_files.bundle import bundle
from tokentrim.tools.bundle import PIPELINE
from tokentrim.tools.publish import publish


ROOMS = [path for path in ROOT.glob("tokentrim_*/*.py") if path.name != "__init__.py"]
SIBLINGS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in [*ROOT.glob("tokentrim_*.py"), *ROOMS]
)
PROMPT = "a red circle moving right over a blue background"
SETTINGS = {"window_size": 9, "num_sink_frames": 3, "relative_positions": True}
SIZE = {"height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": 2}
CALL = {"num_frames": 45, "drift_sensitivity": 0.0, "output_type": "latent"}
PAGE = (ROOT / "docs" / "loading.md").read_text()
PREAMBLE = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)[1]
WAYS = dict(re.findall(r"^\| (.+?) \| `(.+?)` \|", PAGE, flags=re.M))


# What the sources have to look like for Diffusers' loader


def source_of(module):
    return (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()


def relative_imports(name):
    """Modules that a file imports from this project, found by `ast` and by Diffusers' pattern."""
    source = source_of(name)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    found = re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
    found += re.findall(r"^\s*import\s+\.(\S+)\s*$", source, flags=re.MULTILINE)
    return [(node.level, node.module) for node in nodes], found


@pytest.mark.parametrize("name", ["pipeline_tokentrim", "pipeline"])
def test_the_loader_sees_every_module(name):
    """Diffusers copies the modules that the main file names, one line each, at most one folder deep."""
    imported, found = relative_imports(name)
    assert sorted(imported) == sorted((1, module) for module in found)
    assert sorted({*found} - {"pipeline_tokentrim"}) == SIBLINGS
    assert all(module.count(".") <= 1 for module in SIBLINGS)


def test_the_scheduler_file_stands_alone():
    assert relative_imports("tokentrim_scheduler") == ([], [])


def test_plotting_packages_are_not_imported_at_load():
    """The loader imports all modules of import statements, also inside functions, and warns about missing ones."""
    for name in ("pipeline_tokentrim", *SIBLINGS):
        assert not re.search(r"^\s*(from|import)\s+(matplotlib|imageio)", source_of(name), re.M)


def test_every_public_name_exists():
    assert {name for name in tokentrim.__all__ if getattr(getattr(tokentrim, name), "__name__", name) != name} == set()
    with pytest.raises(AttributeError, match="no_such_name"):
        tokentrim.no_such_name  # noqa: B018


def wan_parts(scheduler):
    return (tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), scheduler, tiny_transformer())


def wan_pipeline():
    settings = {"flow_shift": 5.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return quiet(WanPipeline(*wan_parts(UniPCMultistepScheduler(**settings))))


def latents(pipe):
    return quiet(pipe)(PROMPT, generator=generators(0), **CALL, **SIZE).frames


def test_from_pipe():
    """Components are shared, the scheduler is lifted and the other pipeline keeps its own, settings are arguments."""
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


def test_plain_wan_folder_loads(tmp_path):
    """The scheduler keeps its shift; a causal transformer may replace the folder's."""
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


def test_checkpoint_of_another_family_raises():
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    with pytest.raises(ValueError, match="`vae` must be an AutoencoderKLWan, .*but is 'AutoencoderKL'"):
        TokenTrimPipeline(None, None, tiny_transformer(), vae, None)


def test_folders_saved_with_and_without_code_load(tmp_path):
    """Without code, stock names. With code, it is where the loader looks, and saving again keeps naming it."""
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0), **SETTINGS)

    def save(name, **kwargs):
        pipe.save_pretrained(tmp_path / name, **kwargs)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert {setting: index[setting] for setting in SETTINGS} == SETTINGS
        return index["_class_name"], index["scheduler"]

    stock = "AnyFlowFARPipeline", ["diffusers", "FlowMatchLCMScheduler"]
    ours = ["pipeline_tokentrim", "TokenTrimPipeline"], stock[1]
    assert save("stock") == stock and not list((tmp_path / "stock").rglob("*.py"))
    assert save("ours", include_code=True) == ours and save("ours") == ours
    (code,) = (tmp_path / "ours").rglob("*.py")
    assert code == tmp_path / "ours" / "pipeline_tokentrim.py" and code.read_text() == bundle(PIPELINE)

    pipe.scheduler = tokentrim.lift_scheduler(FlowMatchHeunDiscreteScheduler(shift=5.0))  # into a class of no file
    assert save("heun", include_code=True) == (ours[0], ["diffusers", "FlowMatchHeunDiscreteScheduler"])


# In fresh processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The sources of the table in docs/loading.md, in folders and on a Hub."""
    folder = tmp_path_factory.mktemp("world")
    ours = full_pipeline(FlowMatchLCMScheduler(shift=5.0), **SETTINGS)
    ours.save_pretrained(folder / "checkpoint")
    ours.save_pretrained(folder / "with-code", include_code=True)
    wan_pipeline().save_pretrained(folder / "wan")
    (folder / "tokentrim").symlink_to(ROOT)
    (folder / "tokentrim_bundle.py").write_text(bundle(PIPELINE))

    repositories = folder / "hub"
    publish("you/code", repositories / "code")
    publish("you/both", repositories / "both", folder / "checkpoint", license="apache-2.0")
    for name, file in (("code", "pipeline.py"), ("both", "pipeline_tokentrim.py")):  # another code in another revision
        shutil.copytree(repositories / name, repositories / f"{name}-v1")
        with (repositories / f"{name}-v1" / file).open("a") as code:
            code.write('\nTokenTrimPipeline.revision = "v1"\n')
    revisions = {
        "you/weights": {"main": folder / "checkpoint"},
        "you/code": {"main": repositories / "code", "v1": repositories / "code-v1"},
        "you/both": {"main": repositories / "both", "v1": repositories / "both-v1"},
    }
    expected = {}
    for scheduler, of_scheduler in (("FlowMatchLCM", "checkpoint"), ("UniPCMultistep", "wan")):
        pipe = TokenTrimPipeline.from_pretrained(folder / of_scheduler, **SETTINGS)
        expected[f"TokenTrim{scheduler}Scheduler"] = latents(pipe)
    of_hub = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with (
        Hub(revisions, folder / "uploads") as hub,
        Nursery(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, **of_hub) as online,
        Nursery(HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url, **of_hub) as offline,
    ):
        yield SimpleNamespace(folder=folder, hub=hub, online=online, offline=offline, expected=expected)


@pytest.fixture
def here(world, tmp_path):
    """A folder for a script, with links to the sources that it may load."""
    for path in world.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


QUIET = "from diffusers.utils import logging; logging.set_verbosity_error()"
LOUD = "logging.set_verbosity_warning()"
# Pipelines in memory, whose own loading says what their classes do not expect.
GIVEN = {
    "anyflow": 'AnyFlowFARPipeline.from_pretrained("checkpoint")',
    "wan": 'WanPipeline.from_pretrained("wan")',
    "causal": 'AnyFlowFARPipeline.from_pretrained("checkpoint").transformer',
    "snapshots": '__import__("json").load(open("snapshots.json"))',
}
DOWNLOAD = """
import huggingface_hub, json
print(json.dumps({name: huggingface_hub.snapshot_download(f"you/{name}") for name in ("weights", "code", "both")}))
"""
CHECK = f"""
import torch
pipe.set_progress_bar_config(disable=True)
generator = [torch.Generator().manual_seed(0)]
torch.save(pipe({PROMPT!r}, generator=generator, **{CALL | SIZE}).frames, "latents.pt")
print(type(pipe).__name__, type(pipe.scheduler).__name__, getattr(pipe, "revision", None))
"""


@pytest.fixture
def run(world, here):
    """Run code that makes `pipe`, which must make the expected latents, bit by bit, without warnings."""

    def run(code, nursery=world.offline, scheduler="FlowMatchLCM", revision=None, warnings=()):
        printed, warned = nursery.run(f"{code}\n{CHECK}", here)
        scheduler = f"TokenTrim{scheduler}Scheduler"
        assert printed.split() == ["TokenTrimPipeline", scheduler, str(revision)]
        assert all(any(known in line for known in warnings) for line in warned), warned
        assert torch.load(here / "latents.pt").equal(world.expected[scheduler])

    return run


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_load_makes_the_same_latents(way, world, here, run):
    code = WAYS[way]
    script = [PREAMBLE, f"rollout = {SETTINGS}"]
    if "snapshots" in code:
        (here / "snapshots.json").write_text(world.online.run(DOWNLOAD, here)[0])
    if code.startswith("TokenTrimPipeline"):
        script.append("from tokentrim import TokenTrimPipeline")
    for name, stock in GIVEN.items():
        if re.search(rf"[(=]{name}\b", code):
            script.append(f"{QUIET}\n{name} = {stock}\n{LOUD}")
    run(
        "\n".join([*script, f"pipe = {code}"]),
        nursery=world.online if '"you/' in code else world.offline,
        scheduler="UniPCMultistep" if "wan" in code else "FlowMatchLCM",
        revision="v1" if "v1" in code else None,
        warnings=["should be kept in float32"] if "from_pipe" in code else [],  # it casts, whatever the pipeline
    )


UNTRUSTED = "`trust_remote_code=True`"
REFUSALS = {
    'DiffusionPipeline.from_pretrained("checkpoint", custom_pipeline="tokentrim/pipeline_tokentrim.py")': UNTRUSTED,
    'DiffusionPipeline.from_pretrained("checkpoint", custom_pipeline="tokentrim")': UNTRUSTED,
    'DiffusionPipeline.from_pretrained("with-code")': UNTRUSTED,
    'DiffusionPipeline.from_pretrained("you/weights", custom_pipeline="you/code")': UNTRUSTED,
    'DiffusionPipeline.from_pretrained("you/both")': UNTRUSTED,
    'load("you/weights", custom_pipeline="you/nothing")': "you/nothing",
    'load("you/weights", custom_pipeline="you/code", custom_revision="v9")': "Revision Not Found",
    'load("checkpoint", custom_pipeline="you/code"); import huggingface_hub as hub; '  # cached, and then offline
    'hub.constants.HF_HUB_OFFLINE = True; load("checkpoint", custom_pipeline="you/code")': "offline mode is enabled",
    'diffusers = sys.modules["diffusers"]; del diffusers.AnyFlowFARPipeline; '  # as before 0.39.0
    'diffusers._class_to_module.pop("AnyFlowFARPipeline"); load("checkpoint", custom_pipeline="tokentrim")': (
        "TokenTrim needs diffusers 0.39.0 or newer, but .* is here: `pip install -U diffusers`"
    ),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_unsupported_ways_to_load_say_what_to_do(code, world, here):
    script = f"{PREAMBLE}\nimport sys\ntry:\n    {code}\nexcept Exception as error:\n    print(error)"
    nursery = world.online if '"you/' in code else world.offline
    assert re.search(REFUSALS[code], nursery.run(script, here)[0])


def test_hub_serves_every_file_once(world, here, run):
    """Weights and code are downloaded once; a second load uses the cache and only asks for changes."""
    world.hub.requests.clear()
    load = 'pipe = load("you/weights", custom_pipeline="you/code")'
    run(f"{PREAMBLE}\n{load}\n{load}", world.online)
    fetched = [request for request in world.hub.requests if request.startswith("GET /you/")]
    assert len(fetched) == len(set(fetched))
    assert sum(request.endswith(("/pipeline.py", "/pipeline_tokentrim.py")) for request in fetched) == 2
    assert sum("safetensors" in request for request in fetched) == 3
    assert sum(".py" in request for request in world.hub.requests) <= 12  # two loads, each of two files


def test_published_folders_load(world, here, run):
    """Folders uploaded by `save_pretrained(push_to_hub=True)` and `upload_folder` load again, and the Hub accepts the
    cards."""
    script = f"""{PREAMBLE}
import huggingface_hub
pipe = load("with-code")
pipe.save_pretrained("pushed", include_code=True, push_to_hub=True, repo_id="you/pushed", token="hf_none")
huggingface_hub.create_repo("you/uploaded", token="hf_none")
huggingface_hub.upload_folder(repo_id="you/uploaded", folder_path="hub/both", token="hf_none")
for name in ("code", "both"):
    huggingface_hub.ModelCard.load(f"hub/{{name}}/README.md").validate()
"""
    world.online.run(script, here)
    cards = {(world.folder / "hub" / name / "README.md").read_text() for name in ("code", "both")}
    assert cards <= set(world.hub.cards)
    for name in ("pushed", "uploaded"):
        run(f'{PREAMBLE}\npipe = load("you/{name}")', world.online)


def test_saving_from_each_kind_of_pipeline(world, here, run):
    """A pipeline from a file, a Hub or a bundle saves its own code, and plain folders without it."""
    sources = {
        "file": 'load("checkpoint", custom_pipeline="tokentrim/pipeline_tokentrim.py")',
        "code": 'load("with-code")',
        "bundle": 'load("checkpoint", custom_pipeline="tokentrim_bundle.py")',
    }
    for name, source in sources.items():
        script = f"{PREAMBLE}\npipe = {source}\npipe.save_pretrained('{name}-code', include_code=True)"
        world.offline.run(f"{script}\npipe.save_pretrained('{name}-plain')", here)
        run(f'{PREAMBLE}\npipe = load("{name}-code")')
        run(f'{PREAMBLE}\npipe = load("{name}-plain", custom_pipeline="tokentrim")')
    stock = (
        '{PREAMBLE}\npipe = DiffusionPipeline.from_pretrained("file-plain")\nprint(type(pipe), type(pipe.scheduler))'
    )
    printed, _ = world.offline.run(stock.format(PREAMBLE=PREAMBLE), here)
    assert "AnyFlowFARPipeline" in printed and ".FlowMatchLCMScheduler" in printed


def test_schedulers_work_as_components(world, here):
    """With the scheduler's file in the scheduler's folder, each class loads alone, is kept, and saves its config."""
    code = here / "saved"
    shutil.copytree(world.folder / "with-code", code)
    shutil.copy(ROOT / "tokentrim_scheduler.py", code / "scheduler")
    index = json.loads((code / "model_index.json").read_text())
    configs = {
        "TokenTrimFlowMatchEulerDiscreteScheduler": {"shift": 5.0},
        "TokenTrimFlowMapEulerDiscreteScheduler": {"shift": 5.0},
        "TokenTrimUniPCMultistepScheduler": {
            "flow_shift": 5.0,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        },
    }
    for scheduler, config in configs.items():
        index["scheduler"] = ["tokentrim_scheduler", scheduler]
        (code / "model_index.json").write_text(json.dumps(index))
        (code / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        script = f"""{PREAMBLE}
pipe = load("saved")
pipe.scheduler.save_pretrained("scheduler")
again = type(pipe.scheduler).from_pretrained("scheduler")
assert all(again.config[name] == value for name, value in {config}.items())
{CHECK}"""
        assert world.offline.run(script, here)[0].split()[1] == scheduler
        ours = TokenTrimPipeline.from_pretrained(
            world.folder / "checkpoint", scheduler=getattr(tokentrim, scheduler)(**config)
        )
        assert torch.load(here / "latents.pt").equal(latents(ours))


def test_wheel_contains_what_it_needs(world, here, run):
    """An installation holds every module, and the files that `publish` reads."""
    source = here / "source"
    ignored = shutil.ignore_patterns(".*", "checkpoints", "tests", "build", "*.egg-info", "docs", "runs", "demo")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", here / "site", source], check=True, stderr=subprocess.DEVNULL)
    (here / "tokentrim").unlink()
    script = """
import sys; sys.path.insert(0, "site")
from tokentrim import TokenTrimPipeline
assert "site/tokentrim" in sys.modules["tokentrim"].__file__
import tokentrim.tools.bundle, tokentrim.tools.convert, tokentrim.tools.generate
from tokentrim.tools.publish import publish
publish("you/installed", "published", "checkpoint", license="apache-2.0")
pipe = TokenTrimPipeline.from_pretrained("checkpoint")
"""
    run(script)
    run(f'{PREAMBLE}\npipe = load("published")')
    command = here / "site" / "bin" / "tokentrim"
    environment = {**os.environ, "PYTHONPATH": str(here / "site")}
    process = subprocess.run([command, "--version"], cwd=here, env=environment, capture_output=True, text=True)
    assert process.stdout == f"tokentrim {tokentrim.__version__}\n", process.stderr


def test_importing_the_package_loads_nothing():
    script = "import tokentrim, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokentrim").symlink_to(ROOT)
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)


def test_diffusers_cli_runs_a_folder_with_code(world, here):
    arguments = {"prompt": PROMPT, "num_frames": 9, **SIZE}
    script = f"""
import json, sys
from diffusers.commands.diffusers_cli import main
sys.argv = ["diffusers-cli", "--format", "json", "run", "--model", "with-code", "--trust-remote-code"]
sys.argv += ["--output", "fox.mp4", "--pipeline-kwargs", json.dumps({arguments})]
main()
"""
    printed, _ = world.offline.run(script, here)
    assert json.loads(printed)["pipeline_class"] == "TokenTrimPipeline"
    assert (here / "fox.mp4").stat().st_size > 1000
