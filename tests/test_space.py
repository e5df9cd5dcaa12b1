"""The Space without its page: the files and the end of a run, and refused requests. tests/test_app.py tests the page."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from research.training import photographs, travelling
from research.training.world import COLORS, DIRECTIONS, SHAPES, Scene, parse
from tokentrim.tokentrim_frames.mp4 import save_video
from tokentrim.tools import worlds
from tokentrim.tools.cli import main
from tokentrim.tools.drift import measure_video
from tokentrim.tools.drift_plot import plot_drift
from tokentrim.tools.frames import Limits, read_frames
from tokentrim.tools.verdict import ROWS


sys.path.insert(0, str(ROOT / "space"))

import line  # noqa: E402
import measure  # noqa: E402
import runs  # noqa: E402


SETTINGS = runs.Settings("a red circle moving right over a blue background", 3, "tokentrim", "tokentrim_plus", None, 4)
FILES = ["left.mp4", "right.mp4", "decisions.json", "settings.json", "make_videos.py"]
GREEN = "a red circle moving right over a green background"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny world of 2 steps, as `checkpoints/tiny-world`."""
    home, source = tmp_path_factory.mktemp("home"), ROOT / "checkpoints" / "tiny-world"
    checkpoint = home / "checkpoints" / "tiny-world"
    checkpoint.mkdir(parents=True)
    for path in source.iterdir():
        (checkpoint / path.name).symlink_to(path)
    (checkpoint / "model_index.json").unlink()
    index = json.loads((source / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "num_inference_steps": 2}))
    return home


@pytest.fixture(scope="module")
def studio(home):
    return runs.Studio(str(home / "checkpoints" / "tiny-world"), max_chunks=20, name="checkpoints/tiny-world")


def test_weights_are_shared_and_modules_are_not(studio):
    left, right = (studio.pipes[side].transformer for side in runs.SIDES)
    assert left is not right and left.blocks[0].attn1 is not right.blocks[0].attn1
    pairs = list(zip(left.parameters(), right.parameters(), strict=True))
    assert pairs and all(first is second for first, second in pairs)


def test_script_makes_the_same_files(studio, home, tmp_path, monkeypatch):
    """Also if the prompt was changed during the run, and if the run was stopped."""
    settings = dataclasses.replace(SETTINGS, num_chunks=9)
    for state in studio.roll_out(settings, tmp_path / "run"):
        if state["made"] == 2 and state["status"] == "running":
            runs.ask_to_change(tmp_path / "run", runs.Change(GREEN, None, "cut"))
        if state["made"] == 4:
            runs.ask_to_stop(tmp_path / "run")
    assert (state["status"], state["made"]) == ("stopped", 4)
    assert [at for at, _ in state["prompts"]] == [0, 2]
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert record["num_frames"] == 12 and record["changes"] == {"2": {"prompt": GREEN, "transition": "cut"}}
    assert [len(chunks) for chunks in json.loads((tmp_path / "run" / "decisions.json").read_text()).values()] == [4, 4]

    script = (tmp_path / "run" / "make_videos.py").read_text()
    assert len(script.splitlines()) == 10
    (tmp_path / "checkpoints").symlink_to(home / "checkpoints")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        exec(script, {})
    for name in ("left.mp4", "right.mp4"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert (tmp_path / "left.mp4").read_bytes() != (tmp_path / "right.mp4").read_bytes()


@pytest.mark.parametrize("how", ["stop", "leave", "close"])
def test_run_stops_within_a_chunk_and_frees_the_model(studio, tmp_path, how):
    folder = tmp_path / "run"
    states = studio.roll_out(dataclasses.replace(SETTINGS, num_chunks=20), folder)
    for _ in range(3):
        state = next(states)
    if how == "stop":
        runs.ask_to_stop(folder)
        assert next(states) == {**state, "status": "stopped", "files": FILES}
    elif how == "leave":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        assert list(states) == []
    states.close()
    for pipe in studio.pipes.values():
        with pipe.stream(SETTINGS.prompt, num_frames=3, generator=torch.manual_seed(0)) as stream:
            next(stream)


def test_changes_happen_once_and_on_time(tmp_path):
    inbox = runs.Inbox(tmp_path)
    now, later = runs.Change(GREEN, None, "cut"), runs.Change(SETTINGS.prompt, 3, "keep")
    runs.ask_to_change(tmp_path, later)
    assert inbox.due(0) == [] and inbox.due(1) == []
    runs.ask_to_change(tmp_path, now)
    assert inbox.due(2) == [now]
    runs.ask_to_change(tmp_path, now)
    assert inbox.due(3) == [later, now] and inbox.due(4) == []


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"prompt": "a red fox trots over a blue background"}, "does not know 'fox', 'trots'"),
        ({"prompt": "red " * 500}, "1999 characters"),
        ({"num_chunks": 21}, "1 to 20 chunks"),
        ({"seed": -1}, "seed"),
        ({"left": "magic"}, "`method`"),
        ({"layout": "magic"}, "`layout`"),
    ],
)
def test_invalid_settings_raise_a_sentence(studio, wrong, sentence):
    studio.check(SETTINGS)
    with pytest.raises((TypeError, ValueError), match=sentence):
        studio.check(dataclasses.replace(SETTINGS, **wrong))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (runs.Change("", None, "cut"), "empty"),
        (runs.Change(GREEN, 4, "cut"), "chunks 1 to 3"),
        (runs.Change(GREEN, 1, "melt"), "prompt_transition"),
    ],
)
def test_impossible_change_raises_early(studio, change, sentence):
    studio.check(SETTINGS, runs.Change(GREEN, 1, "cut"))
    with pytest.raises(ValueError, match=sentence):
        studio.check(SETTINGS, change)


def test_words_are_those_of_the_worlds():
    assert worlds.COLORS == tuple(COLORS) and worlds.SHAPES == SHAPES and worlds.DIRECTIONS == tuple(DIRECTIONS)
    assert (worlds.PACES, worlds.SIDES) == (tuple(travelling.PACES), tuple(travelling.DIRECTIONS))
    assert (worlds.GROUNDS, worlds.LIGHTS) == (tuple(travelling.GROUNDS), tuple(travelling.LIGHTS))
    assert worlds.PLACES == tuple(photographs.PLACES)
    of_tiny = worlds.WORLDS["tiny-world"].make_sentence("orange ring", "up", "white")
    assert of_tiny == Scene("orange", "ring", "up", "white").prompt
    assert set(worlds.WORLDS) <= {path.name for path in (ROOT / "checkpoints").iterdir()}


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_words_and_examples_of_a_world_are_prompts_that_it_knows(name):
    shown = worlds.WORLDS[name]
    parse_prompt = {"travelling-world": travelling.parse, "photographs": photographs.parse}.get(name, parse)
    assert shown.make_sentence(*shown.chosen) == shown.examples[0]
    assert all(word in words for word, words in zip(shown.chosen, shown.words.values(), strict=True))
    assert all(parse_prompt(example) for example in shown.examples)
    for number, words in enumerate(shown.words.values()):
        for word in words:
            parse_prompt(shown.make_sentence(*shown.chosen[:number], word, *shown.chosen[number + 1 :]))


@pytest.fixture
def video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)
    return save_video(tmp_path / "x.mp4", frames, 16)


@pytest.mark.parametrize("limit", [{"frames": 59}, {"pixels": 1535}, {"seconds": 1e-6}])
def test_measuring_ends_at_each_limit(limit, video, tmp_path, monkeypatch):
    numbers = tmp_path / "drift.json"
    monkeypatch.setattr(measure, "LIMITS", Limits(**limit))
    with pytest.raises(ValueError, match="^x.mp4 .*the limit here"):
        measure.measure(video, numbers)
    assert not numbers.exists()


def test_measuring_stops_when_the_visitor_leaves(video, tmp_path, monkeypatch):
    """When the visitor leaves, the folder is removed."""
    folder, read = tmp_path / "visitor", []
    folder.mkdir()

    def read_frames(*arguments):
        for frame in iter_frames(*arguments):
            read.append(frame)
            if len(read) == 5:
                shutil.rmtree(folder)
            yield frame

    iter_frames = measure.read_frames
    monkeypatch.setattr(measure, "read_frames", read_frames)
    with pytest.raises(ValueError, match="The visitor has left"):
        measure.measure([video], folder / "drift.json")
    assert len(read) <= 6


def test_the_page_and_the_command_report_the_same_numbers(video, tmp_path, capsys):
    other = save_video(tmp_path / "other.mp4", np.full((60, 32, 48, 3), 90, np.uint8), 16)
    text, figures = measure.measure([video, other], tmp_path / "drift.json")
    assert main(["drift", str(video), str(other)]) == 0
    printed = capsys.readouterr().out
    for line in printed.split("\n\n")[0].splitlines():
        assert f"**{line}**" in text
    of_page = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    of_command = [re.split(r"  +", line) for line in printed.splitlines()]
    assert len(of_page) == 1 + len(ROWS) and all([cell.strip(" |") for cell in row] in of_command for row in of_page)
    assert figures.count("<img") == 2 and (tmp_path / "drift.json").exists()


def test_every_limit_is_set_for_visitors():
    assert all(vars(measure.LIMITS).values())


def test_example_is_a_finished_run_of_the_first_world():
    folder = ROOT / "space" / "example"
    state, first = json.loads((folder / "state.json").read_text()), next(iter(worlds.WORLDS.values()))
    assert (state["status"], state["made"], state["is_example"]) == ("done", first.chunks, True)
    assert state["prompts"] == [[0, first.examples[0]]] and [side["method"] for side in state["sides"]] == [
        "plain",
        "tokentrim_plus",
    ]
    for side in state["sides"]:
        path = folder / f"{side['name']}.mp4"
        assert path.stat().st_size == side["bytes"]
        frames = np.stack(list(read_frames(path)))
        assert len(frames) == state["num_frames"] == sum(chunk["frames"] for chunk in side["chunks"])
    left, right = (np.mean([chunk["drift"] for chunk in side["chunks"][-25:]]) for side in state["sides"])
    assert left > right


def test_nothing_in_a_dark_figure_is_dark():
    """Neither text nor the line of the distance between two videos; the grid is dim."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 48, 3), np.uint8)
    figure = measure.darkened(plot_drift([measure_video(name, iter(each)) for name, each in zip("ab", frames)]))
    drawn = [*figure.findobj(Text), *(line for axes in figure.axes for line in axes.lines)]
    assert len(drawn) > 20 and all(max(to_rgb(each.get_color())) > 0.3 for each in drawn)


# Places in a line, and what visitors are told of files


def visitor(session="one", address="10.0.0.1"):
    return line.Visitor(session, address)


def test_visitors_are_served_in_the_order_of_their_arrival():
    queue, visitors = line.Line(5), [visitor(str(number)) for number in range(4)]
    with contextlib.ExitStack() as served_last:
        with queue.place(visitors[0]):
            for each in visitors[1:]:
                served_last.enter_context(queue.place(each))
            assert [queue.num_before(each) for each in visitors] == [0, 1, 2, 3]
        assert [queue.num_before(each) for each in visitors[1:]] == [0, 1, 2]
    assert queue.visitors == []


@pytest.mark.parametrize(
    "size, held, sentence",
    [
        (99, [visitor("one", str(number)) for number in range(line.OF_SESSION)], "Your earlier requests are still"),
        (99, [visitor(str(number)) for number in range(line.OF_ADDRESS)], "of your network"),
        (3, [visitor(str(number), str(number)) for number in range(3)], "All 3 places in the line are taken"),
    ],
)
def test_visitor_without_a_free_place_is_refused(size, held, sentence):
    queue = line.Line(size)
    with contextlib.ExitStack() as places:
        *others, newest = held
        for each in others:
            places.enter_context(queue.place(each))
        with pytest.raises(KeyError), queue.place(newest):
            with pytest.raises(ValueError, match=sentence), queue.place(visitor()):
                pass
            raise KeyError  # a place is free again, however its visit ended
        with queue.place(visitor()):
            assert queue.visitors[:-1] == others


@pytest.mark.parametrize("session", [None, ""])
def test_visitor_without_a_session_is_refused(session):
    with pytest.raises(ValueError, match="no session"):
        line.Visitor(session, "10.0.0.1")


def test_folder_is_old_an_hour_after_its_last_new_file(tmp_path):
    assert not line.is_old(tmp_path) and not line.is_old(tmp_path / "none")
    for age, expected in ((line.KEPT - 5, False), (line.KEPT + 5, True)):
        os.utime(tmp_path, (time.time() - age, time.time() - age))
        assert line.is_old(tmp_path) is expected
    (tmp_path / "x").touch()
    assert not line.is_old(tmp_path)


@pytest.mark.parametrize(
    "text, told",
    [
        ("no file /srv/secret/model/index.json", "no file index.json"),
        ("no file '/srv/secret/model' here", "no file 'model' here"),
        ("no folder /srv/secret/model/, so", "no folder model, so"),
        ("[Errno 28] No space left on device: '/tmp/x/left.mp4'", "[Errno 28] No space left on device: 'left.mp4'"),
        (r"no file C:\Users\secret\x.json", "no file x.json"),
        ("(/srv/secret/a and /srv/secret/b)", "(a and b)"),
        ("docs/drift.md says 16/9 and https://huggingface.co/org/model", None),
        ("the model you/tiny, 3 of 4 / 5", None),
    ],
)
def test_messages_have_no_absolute_paths(text, told):
    assert line.without_folders(text) == (text if told is None else told)


@pytest.mark.parametrize(
    "client, forwarded, address",
    [
        ("9.9.9.9", "", "9.9.9.9"),
        ("9.9.9.9", "8.8.8.8", "9.9.9.9"),  # no proxy wrote it
        ("10.0.0.1", "8.8.8.8", "8.8.8.8"),
        ("10.0.0.1", "1.1.1.1, 8.8.8.8", "8.8.8.8"),  # the visitor wrote the first
        ("10.0.0.1", "8.8.8.8, 10.2.3.4", "8.8.8.8"),
        ("10.0.0.1", "x, ", "10.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("::1", "2606:4700::1111", "2606:4700::1111"),
        ("", "", ""),
    ],
)
def test_address_of_a_visitor_is_the_nearest_public_one(client, forwarded, address):
    assert line.find_address(client, forwarded) == address
