"""The page's actions without a browser: sessions, places in the line, old files, and what visitors are told of folders.

make test-app     # in the environment of the page
"""

import dataclasses
import json
import os
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from tokentrim.tokentrim_frames.mp4 import save_video


gr = pytest.importorskip("gradio", reason="Gradio is not in this environment: `make test-app`")
sys.path.insert(0, str(ROOT / "space"))

import app as page_app  # noqa: E402
import line  # noqa: E402
import page  # noqa: E402
import visits  # noqa: E402


PROMPT = "a red circle moving right over a blue background"
ASKED = {
    "prompt": PROMPT,
    "seed": 0,
    "left": "plain",
    "right": "tokentrim_plus",
    "layout": "",
    "num_chunks": 2,
    "next_prompt": "",
    "next_chunk": 0,
    "transition": "cut",
}


def request(session="one", address="10.0.0.1"):
    return SimpleNamespace(session_hash=session, client=SimpleNamespace(host=address), headers={})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny world of 2 steps, in a folder of another name."""
    folder, source = tmp_path_factory.mktemp("secret") / "my-model", ROOT / "checkpoints" / "tiny-world"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    (folder / "model_index.json").unlink()
    index = json.loads((source / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "num_inference_steps": 2}))
    return folder


@pytest.fixture(scope="module")
def served(checkpoint):
    """The app as `app.py` builds it for a user's checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENTRIM_CHECKPOINT", str(checkpoint))
        return page_app.load_app()


@pytest.fixture
def app(served):
    app = visits.App(served.models)
    yield app
    for session in [*app.visits, *app.reports]:
        app.forget(request(session))


@pytest.fixture
def video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), np.uint8)
    return str(save_video(tmp_path / "x.mp4", frames, 16))


def watch(app, who, **asked):
    (name,) = app.models.checkpoints
    return app.watch(name, *{**ASKED, **asked}.values(), who)


def last(states):
    return list(states)[-1]


def make_old(folder):
    old = time.time() - line.KEPT - 1
    os.utime(folder, (old, old))


def test_request_without_a_session_is_refused(app, video):
    for session in (None, ""):
        told = last(watch(app, request(session)))
        assert told["status"] == "error" and "no session" in told["message"]
        with pytest.raises(gr.Error, match="no session"):
            app.measure([video], request(session))
        with pytest.raises(gr.Error, match="no session"):
            app.change(PROMPT, 0, "cut", request(session))
        app.stop(request(session))
        app.forget(request(session))
    assert app.visits == app.reports == {} and list(app.runs.iterdir()) == []


def test_visitor_with_all_places_is_refused_and_keeps_the_run(app):
    """The line has room for others."""
    with closing(watch(app, request("one"))) as first:
        next(first), next(first)
        folder = app.visits["one"].folder
        waiting = [app.line.place(line.Visitor(f"tab {number}", "10.0.0.1")) for number in range(line.OF_ADDRESS - 1)]
        for place in waiting:
            place.__enter__()
        told = last(watch(app, request("one")))
        assert told["status"] == "error" and "of your network" in told["message"]
        assert app.visits["one"].folder == folder and folder.exists()
        with closing(watch(app, request("other", "10.0.0.2"))) as other:
            assert "Looking" in next(other)["message"]
            assert next(other)["message"].startswith(f"{line.OF_ADDRESS} videos are made before yours")
        for place in waiting:
            place.__exit__(None, None, None)
    assert app.line.visitors == []


def test_measurements_wait_in_a_line_of_their_own(app, video, monkeypatch):
    """One at a time; a visitor has few places."""
    may_go, running = threading.Event(), []

    def measure(paths, numbers):
        running.append(1)
        assert may_go.wait(60) and len(running) == 1
        running.pop()
        return "report", "figure"

    monkeypatch.setattr(visits, "measure", measure)
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(app.measure([video], request()))) for _ in range(line.OF_SESSION)
    ]
    for thread in threads:
        thread.start()
    while len(app.measuring.visitors) < line.OF_SESSION:
        time.sleep(0.01)
    with pytest.raises(gr.Error, match="still in the line"):
        app.measure([video], request())
    may_go.set()
    for thread in threads:
        thread.join()
    assert [each[0] for each in done] == ["report"] * line.OF_SESSION and app.measuring.visitors == []


def test_waiting_visitors_leave_threads_to_the_server():
    """Each place in a line holds one of the server's threads; the first visitor's video needs another."""
    assert sum(visits.PLACES) < visits.THREADS - 4


def test_old_files_of_programs_are_deleted_at_the_next_visit(app, video):
    app.measure([video], request("measured"))
    assert last(watch(app, request("gone")))["status"] == "done"
    assert last(watch(app, request("recent")))["status"] == "done"
    old = [app.visits["gone"].folder, app.reports["measured"]]
    with closing(watch(app, request("running"))) as running:
        next(running), next(running)
        for folder in (*old, app.visits["running"].folder):
            make_old(folder)
        assert last(watch(app, request("next"), num_chunks="x"))["status"] == "error"
        assert all(folder.exists() for folder in old)  # no visit
        app.measure([video], request("next"))
        assert not any(folder.exists() for folder in old)
        assert set(app.visits) == {"recent", "running"} and set(app.reports) == {"next"}
        assert last(running)["status"] == "done"


def test_a_visitor_is_told_no_folder_of_the_server(app, checkpoint):
    told = [*watch(app, request())]
    folder = app.visits["one"].folder
    texts = [json.dumps(told).replace(str(app.runs), "")]
    texts += [(folder / name).read_text() for name in ("settings.json", "make_videos.py", "decisions.json")]
    texts.append(json.dumps(page.build(app).get_config_file()).replace(str(app.example), ""))
    for text in texts:
        assert "my-model" in text or "events" in text
        for secret in (checkpoint.parent, ROOT, "/home", "/tmp"):
            assert str(secret) not in text


@pytest.mark.parametrize("checkpoint", ["/srv/models/secret/none", "/srv/models/secret/none/"])
def test_complaint_about_a_checkpoint_names_no_folder(checkpoint, monkeypatch):
    monkeypatch.setenv("TOKENTRIM_CHECKPOINT", checkpoint)
    app = page_app.load_app()
    assert app.models is None and "none" in app.complaint and "secret" not in app.complaint
    told = last(visits.App(None, app.complaint).watch("none", *ASKED.values(), request()))
    assert told == {"status": "error", "message": app.complaint}


@pytest.mark.parametrize(
    "wrong", [{"seed": 1.5}, {"seed": None}, {"num_chunks": float("nan")}, {"seed": float("inf")}]
)
def test_numbers_that_are_not_whole_are_refused(app, wrong):
    told = last(watch(app, request(), **wrong))
    assert told["status"] == "error" and "whole numbers" in told["message"]


def test_unexpected_error_is_in_the_log_only(app, caplog, monkeypatch):
    def roll_out(self, settings, folder):
        raise KeyError("/srv/secret")
        yield

    (studio,) = app.models.loaded.values()
    monkeypatch.setattr(type(studio), "roll_out", roll_out)
    assert "see its log" in last(watch(app, request()))["message"] and "/srv/secret" in caplog.text
    assert dataclasses.is_dataclass(app.visits["one"]) and app.line.visitors == []
