"""The Hub for real: the real client in a fresh process, against a server on the loopback interface."""

import shutil

import numpy as np
import pytest
from builders import full_pipeline, generators
from conftest import ROOT
from diffusers import FlowMatchLCMScheduler
from hub import Hub
from test_loading import CALL, LOAD, PROMPT, SETTINGS, run_fresh

from tokentrim.publish import publish


CHECK = (
    LOAD
    + """
import json, logging
import diffusers, huggingface_hub

records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
diffusers.utils.logging.add_handler(handler)
diffusers.utils.logging.disable_default_handler()
expected = np.load("expected.npy")

def check(name, marked=None, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    assert not records, records
    assert type(pipe).__name__ == "TokenTrimPipeline"
    assert type(pipe.scheduler).__name__ == "TokenTrimFlowMatchLCMScheduler"
    assert getattr(pipe, "marked", None) == marked
    assert np.abs(generate(pipe).frames - expected).max() < 1e-4

def error(name, **kwargs):
    try:
        DiffusionPipeline.from_pretrained(name, **kwargs)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    raise AssertionError(f"{name}, {kwargs} loads")
"""
)
ONLINE = (
    CHECK
    + """
check("you/weights", custom_pipeline="you/code")
check("you/weights", custom_pipeline="you/code", custom_revision="v0", marked="v0")
check("you/both")
check("you/both", revision="v0", marked="v0")
check("you/both", custom_pipeline="pipeline_tokentrim")
check("you/both", custom_pipeline="you/code")
check("you/weights", custom_pipeline="you/both")

ours = {"custom_pipeline": "you/code"}
assert "Pass `trust_remote_code=True`" in error("you/weights", **ours)
assert "Pass `trust_remote_code=True`" in error("you/both")
trusted = {"trust_remote_code": True}
assert "you/nothing" in error("you/weights", custom_pipeline="you/nothing", **trusted)
assert "Revision Not Found" in error("you/weights", custom_revision="v9", **ours, **trusted)

for path in sys.argv[1:]:
    huggingface_hub.ModelCard.load(path).validate()
folders = {name: huggingface_hub.snapshot_download(f"you/{name}") for name in ("weights", "code", "both")}
json.dump(folders, open("folders.json", "w"))
"""
)
OFFLINE = (
    CHECK
    + """
folders = json.load(open("folders.json"))
check(folders["both"])
check(folders["weights"], custom_pipeline=folders["code"])
print(error("you/weights", custom_pipeline="you/code", trust_remote_code=True))
"""
)


@pytest.fixture
def hub(tmp_path):
    """Repositories `you/weights` (no code), `you/code` and `you/both`, as published; `v0` of the code is marked."""
    pipe = full_pipeline(FlowMatchLCMScheduler(shift=5.0), **SETTINGS)
    pipe.save_pretrained(tmp_path / "hub" / "weights")
    publish("you/code", tmp_path / "hub" / "code")
    publish("you/both", tmp_path / "hub" / "both", tmp_path / "hub" / "weights", license="apache-2.0")
    for name, file in (("code", "pipeline.py"), ("both", "pipeline_tokentrim.py")):
        shutil.copytree(tmp_path / "hub" / name, tmp_path / "hub" / f"{name}-v0")
        with (tmp_path / "hub" / f"{name}-v0" / file).open("a") as code:
            code.write('\nTokenTrimPipeline.marked = "v0"\n')
    np.save(tmp_path / "expected.npy", pipe(PROMPT, generator=generators(0), **CALL).frames)
    folders = {path.name: path for path in (tmp_path / "hub").iterdir()}
    revisions = {
        "you/weights": {"main": folders["weights"]},
        "you/code": {"main": folders["code"], "v0": folders["code-v0"]},
        "you/both": {"main": folders["both"], "v0": folders["both-v0"]},
    }
    with Hub(revisions) as hub:
        yield hub


def test_loading_from_the_hub(hub, tmp_path):
    """Code, weights, or both from a repository; pinned, cached, mistaken; then from snapshots, without a network."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    cards = [tmp_path / "hub" / name / "README.md" for name in ("code", "both")]
    run_fresh(ONLINE, tmp_path, *cards, HF_HUB_OFFLINE="0", **variables)
    assert hub.cards == [card.read_text() for card in cards]
    weights = [request for request in hub.requests if request.startswith("GET") and "safetensors" in request]
    assert len(weights) == 6  # three files of two repositories, whose revisions share them
    for sibling in ROOT.glob("tokentrim_*.py"):
        assert any(request.startswith("GET") and sibling.name in request for request in hub.requests)

    asked = len(hub.requests)
    printed = run_fresh(OFFLINE, tmp_path, HF_HUB_OFFLINE="1", **variables)
    assert "OfflineModeIsEnabled" in printed  # a cached Hub id is not enough for code, whatever the pipeline
    assert len(hub.requests) == asked
