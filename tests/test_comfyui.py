"""The nodes in the real ComfyUI, headless on the CPU. `COMFYUI=/path/to/ComfyUI` names its source; `COMFYUI_PYTHON` an
interpreter that has what it needs."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from tokentrim import TokenTrimPipeline


COMFYUI = os.environ.get("COMFYUI")
pytestmark = pytest.mark.skipif(COMFYUI is None, reason="the source of ComfyUI is not here: COMFYUI=/path/to/ComfyUI")
WORLD = ROOT / "checkpoints" / "tiny-world"
PROMPT = "a red circle moving right over a blue background"
LATER = "a green square moving left over a white background"
EXAMPLE = ROOT / "comfyui" / "example_workflows" / "long_video.json"


class Server:
    """ComfyUI on the loopback, with a base folder that holds our nodes and the small world."""

    def __init__(self, base: Path):
        (base / "custom_nodes").mkdir(parents=True)
        (base / "models" / "diffusers").mkdir(parents=True)
        (base / "custom_nodes" / "tokentrim").symlink_to(ROOT / "comfyui")
        (base / "models" / "diffusers" / "tiny-world").symlink_to(WORLD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        options = ["--cpu", "--listen", "127.0.0.1", "--port", self.url.split(":")[-1], "--base-directory", str(base)]
        options += ["--disable-api-nodes", "--database-url", f"sqlite:///{base}/comfy.db"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.log, self.output = base / "log", base / "output"
        with self.log.open("wb") as log:
            command = [python, str(Path(COMFYUI) / "main.py"), *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=COMFYUI, env=environment)

    def wait(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text())

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, content: dict) -> tuple[int, dict]:
        data = json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def run(self, prompt: dict) -> dict:
        """What ComfyUI's history says of a prompt, once it is over."""
        code, answer = self.post("/prompt", {"prompt": prompt})
        assert code == 200, answer
        return self.finished(answer["prompt_id"])

    def finished(self, prompt_id: str, seconds: float = 300) -> dict:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if prompt_id in (history := self.get(f"/history/{prompt_id}")):
                return history[prompt_id]
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("comfyui") / "base")
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)


@pytest.fixture(scope="module")
def make_prompt(server):
    """The example workflow as ComfyUI's page posts it, with other values."""
    workflow, known = json.loads(EXAMPLE.read_text()), server.get("/object_info")

    def make_prompt(**others):
        links, prompt = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}, {}
        for node in workflow["nodes"]:
            inputs = {each["name"]: links[each["link"]] for each in node["inputs"]}
            values, declared = list(node["widgets_values"]), known[node["type"]]["input"]
            for name in [*declared["required"], *declared.get("optional", {})]:
                if name not in inputs:
                    value = values.pop(0)
                    inputs[name] = others.get(name, value)
                    if name == "seed":
                        values.pop(0)  # what becomes of the seed after a run
            assert values == []
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        return prompt

    return make_prompt


SMALL = {"checkpoint": "tiny-world", "num_frames": 45, "prompt": PROMPT, "prompt_schedule": json.dumps({"2": LATER})}


def test_the_workflow_makes_the_video_of_the_pipeline(server, make_prompt, tmp_path):
    history = server.run(make_prompt(**SMALL, seed=7))
    assert history["status"]["status_str"] == "success", server.log.read_text()
    (shown,) = history["outputs"]["2"]["images"]
    made = server.output / shown["subfolder"] / shown["filename"]
    pipe = TokenTrimPipeline.from_pretrained(WORLD)
    call = {"num_frames": 45, "prompt_schedule": {2: LATER}, "method": "tokentrim_plus"}
    stream = pipe.stream(PROMPT, generator=torch.Generator().manual_seed(7), **call)
    stream.save_video(tmp_path / "x.mp4", progress=False)
    assert made.read_bytes() == (tmp_path / "x.mp4").read_bytes()


def test_an_interrupt_leaves_the_finished_chunks(server, make_prompt):
    before = set(server.output.rglob("*.mp4"))
    code, answer = server.post("/prompt", {"prompt": make_prompt(**{**SMALL, "num_frames": 5000}, seed=8)})
    assert code == 200
    end = time.monotonic() + 120
    while not (new := set(server.output.rglob("*.mp4")) - before) and time.monotonic() < end:
        time.sleep(0.1)
    server.post("/interrupt", {})
    status = server.finished(answer["prompt_id"])["status"]
    assert status["status_str"] == "error" and "execution_interrupted" in [name for name, _ in status["messages"]]
    assert all(path.stat().st_size > 0 for path in new) and len(new) == 1
    again = server.run(make_prompt(**SMALL, seed=9))  # the transformer is free again
    assert again["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"checkpoint": ""}, "`checkpoint` must be a folder in Diffusers format, of .*tiny-world.* but is ''"),
        ({"checkpoint": "nothing"}, "`checkpoint` must be a folder in Diffusers format, .*but is 'nothing'"),
    ],
)
def test_a_workflow_without_a_checkpoint_is_refused(server, make_prompt, others, message):
    code, answer = server.post("/prompt", {"prompt": make_prompt(**{**SMALL, **others})})
    assert code == 400
    (error,) = answer["node_errors"]["1"]["errors"]
    assert re.search(message, error["details"]), error


def test_wrong_arguments_are_told_by_the_package(server, make_prompt):
    for others, message in {
        "size": ({"height": 44}, "`height` must be a multiple of 8"),
        "schedule": ({"prompt_schedule": "later"}, "`prompt_schedule` must be a JSON object of prompts by chunk"),
    }.values():
        history = server.run(make_prompt(**{**SMALL, **others}))
        assert history["status"]["status_str"] == "error"
        told = [each["exception_message"] for name, each in history["status"]["messages"] if name == "execution_error"]
        assert len(told) == 1 and message in told[0]
