"""The page in a real browser: headless Chromium, driven by Playwright, on the folder that `make space` writes.

make test-app     # on Debian after `apt-get install chromium`
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from conftest import ROOT

from tokentrim.tokentrim_frames.mp4 import VideoWriter
from tokentrim.tools.frames import read_frames


pytest.importorskip("gradio", reason="Gradio is not in this environment: `make test-app`")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not in this environment: `make test-app`"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: `apt-get install chromium`", allow_module_level=True)

BLUE, PURPLE = "a red circle moving right over a blue background", "a white ring moving up over a purple background"
GREEN = "a red circle moving right over a green background"
TIMEOUT = 300_000  # milliseconds


def server_seconds():
    """Processor time of the servers of this test, in seconds: what the page does, however busy the machine is."""
    children = psutil.Process().children()
    servers = [each for each in children if any(word.endswith("app.py") for word in each.cmdline())]
    return sum(sum(each.cpu_times()[:4]) for each in servers)


@contextmanager
def serve(folder, *command):
    """Start a server; yields its address and its log. PORT in the command becomes a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(str(port) if word == "PORT" else word for word in command)]
    log, address = folder / "server.log", f"http://127.0.0.1:{port}/"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=folder)
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(f"the server does not answer: {log.read_text()}")
        yield address, log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """What `make space` writes, with a tiny world of 2 steps; that world is the first one."""
    folder = tmp_path_factory.mktemp("clone")
    code = [path.name for pattern in ("*.py", "tokentrim_*/") for path in ROOT.glob(pattern)]
    for name in ("Makefile", "LICENSE", "space", "tools", "checkpoints", *code):
        (folder / name).symlink_to(ROOT / name)
    subprocess.run(["make", "space"], cwd=folder, check=True, capture_output=True)
    index = folder / "build" / "space" / "checkpoints" / "tiny-world" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "num_inference_steps": 2}))
    return folder / "build" / "space"


@pytest.fixture(scope="module")
def address(space):
    with serve(space, "app.py") as (address, log):
        yield address
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A visitor with a separate browser context, on the page. Timeouts leave room for a machine that does other work."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#begin")

    def pick(self, world):
        self.page.get_by_label("World", exact=True).click()
        self.page.get_by_role("option", name=world, exact=True).click()
        self.page.wait_for_timeout(500)

    def begin(self, prompt=BLUE, num_chunks=6, right=None, seed=0, world="One shape over one color"):
        page = self.page
        if world:
            self.pick(world)
        page.get_by_label("Prompt", exact=True).fill(prompt)
        if page.get_by_label("Seed").count() == 0 or not page.get_by_label("Seed").is_visible():
            page.get_by_text("More settings").click()
        page.get_by_label("number input for Length in chunks").fill(str(num_chunks))
        page.keyboard.press("Tab")
        page.get_by_label("Seed").fill(str(seed))
        page.keyboard.press("Tab")
        if right:
            page.get_by_label("Right", exact=True).click()
            page.get_by_role("option", name=right).click()
        page.click("#begin")

    def wait_for(self, condition):
        self.page.wait_for_function(condition)

    def wait_for_chunk(self, number):
        self.page.wait_for_function(
            f"parseInt(document.querySelector('#stage .told').textContent.split(' ')[1]) >= {number}"
        )

    def wait_for_end(self):
        """Of a run of the visitor, not of the example."""
        self.page.wait_for_selector("#stage .files a[href*=tokentrim-runs]")

    def told(self):
        return self.page.inner_text("#stage .told")

    def notice(self):
        """The error that stays on the stage."""
        return self.page.wait_for_selector("#stage .notice.error:not([hidden])").inner_text()

    def sentence(self):
        return self.page.wait_for_selector("[data-testid=toast-body]").inner_text()

    def videos(self):
        """For both videos: time, decoded pictures, number of stalls, and the mean color on the screen."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('#stage video')].map((video) => {
                const canvas = Object.assign(document.createElement('canvas'), {width: 16, height: 16});
                const context = canvas.getContext('2d');
                context.drawImage(video, 0, 0, 16, 16);
                return {time: video.currentTime, paused: video.paused, width: video.videoWidth,
                        pixels: [...context.getImageData(0, 0, 16, 16).data]};
            })"""
        )

    def download(self, name):
        link = self.page.locator("#stage .files a", has_text=name).get_attribute("href")
        return self.context.request.get(link).body()

    def download_frames(self, name, folder):
        (folder / name).write_bytes(self.download(name))
        return np.stack(list(read_frames(folder / name)))

    def leave(self):
        assert self.errors == []
        self.context.close()


@pytest.fixture
def arrive(browser, address):
    visitors = []

    def arrive(**options):
        visitors.append(Visitor(browser, address, **options))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()


def test_videos_play_and_plots_grow_while_they_are_made(arrive, tmp_path):
    visitor = arrive()
    begin, spent = time.perf_counter(), server_seconds()
    visitor.begin(num_chunks=30)
    visitor.wait_for_chunk(1)  # until then, the example is shown
    visitor.wait_for("document.querySelector('#stage video').currentTime > 0")
    seconds, spent = time.perf_counter() - begin, server_seconds() - spent
    print(f"first frames {seconds:.1f} s after the button, {spent:.1f} s of the server's processor")
    assert 0 < spent < 5
    samples, lengths = [], []
    for _ in range(6):
        samples.append(visitor.videos())
        lengths.append(len(visitor.page.get_attribute("svg.severity[data-side=left] .severity-line", "d")))
        visitor.page.wait_for_timeout(500)
    assert "full speed" in visitor.told() and visitor.page.locator("#stage .files a").count() == 0  # not finished yet
    times = [[sample[side]["time"] for sample in samples] for side in (0, 1)]
    assert all(sorted(set(side)) == side for side in times)
    assert max(abs(left - right) for left, right in zip(*times)) < 0.1
    assert len({tuple(sample[0]["pixels"]) for sample in samples}) > 2
    assert lengths[-1] > lengths[0]
    visitor.wait_for_end()
    assert visitor.page.evaluate(
        "document.querySelector('#stage .pictures').parentElement.players.map((p) => p.waits)"
    ) == [0, 0]
    assert visitor.told().startswith("chunk 30 of 30") and "complete" in visitor.told()
    local = ("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:")
    assert [url for url in visitor.requests if not url.startswith(local)] == []
    frames = visitor.download_frames("left.mp4", tmp_path)
    assert frames.shape == (90, 64, 64, 3)
    visitor.leave()


def test_the_prompt_changes_while_it_runs(arrive, tmp_path):
    visitor = arrive()
    visitor.page.get_by_text("Direct: change").click()
    visitor.page.get_by_label("New prompt").fill(GREEN)
    visitor.begin(num_chunks=30)
    visitor.wait_for_chunk(2)
    visitor.page.click("#change")
    visitor.wait_for("document.querySelector('#told').textContent.includes('next chunk')")
    visitor.wait_for(f"document.querySelector('#stage .prompt').textContent === '{GREEN}'")
    visitor.wait_for_end()
    (at,) = json.loads(visitor.download("settings.json"))["changes"]
    frames = visitor.download_frames("right.mp4", tmp_path)
    before, after = frames[: 3 * int(at)].mean((0, 1, 2)), frames[3 * int(at) :].mean((0, 1, 2))
    assert before.argmax() == 2 and after.argmax() != 2  # blue, and no longer blue
    visitor.leave()


def test_stop_stops_within_a_chunk(arrive):
    visitor = arrive()
    visitor.begin(num_chunks=100)
    visitor.wait_for_chunk(3)
    made = int(visitor.told().split()[1])
    visitor.page.click("#stop")
    visitor.wait_for_end()
    assert (
        "stopped" in visitor.told() and int(visitor.told().split()[1]) <= made + 2
    )  # one on its way, one to be shown
    assert visitor.page.is_enabled("#begin")
    visitor.leave()


@pytest.mark.parametrize(
    "prompt, sentence", [(" ", "empty"), ("a red fox", "'fox'"), ("red " * 400, "1599 characters")]
)
def test_bad_input_shows_a_sentence(arrive, prompt, sentence):
    visitor = arrive()
    visitor.begin(prompt, num_chunks=9999)
    assert visitor.page.get_by_label("number input for Length in chunks").input_value() == "200"  # the limit
    told = visitor.notice()
    assert sentence in told and "Traceback" not in told
    visitor.wait_for("!document.querySelector('#begin').disabled")
    assert visitor.told().startswith("an example")  # what was shown stays


def test_two_visitors_get_their_own_videos(arrive):
    first, second = arrive(), arrive()
    first.begin(BLUE, 40)
    first.wait_for_chunk(1)
    second.begin(PURPLE, 4)
    second.wait_for(
        "document.querySelector('#stage .notice').textContent.startsWith('One video is made before yours')"
    )
    for visitor in (first, second):
        visitor.wait_for_end()
        assert visitor.page.locator("#stage .notice").is_hidden()
    settings = [json.loads(visitor.download("settings.json")) for visitor in (first, second)]
    assert [each["prompt"] for each in settings] == [BLUE, PURPLE]
    assert [each["num_chunks"] for each in settings] == [40, 4]
    together = second.download("right.mp4")
    alone = arrive()
    alone.begin(PURPLE, 4)
    alone.wait_for_end()
    assert alone.download("right.mp4") == together


def test_a_closed_tab_frees_the_model(arrive):
    gone, next_one = arrive(), arrive()
    gone.begin(num_chunks=200)
    gone.wait_for_chunk(1)
    file = next(url for url in gone.requests if "tokentrim-runs" in url and url.endswith("left.mp4"))
    assert next_one.context.request.get(file).ok
    gone.context.close()
    next_one.begin(num_chunks=2)
    next_one.wait_for_end()
    assert not next_one.context.request.get(file).ok  # without its folder there is no run


def test_evicted_tokens_are_outlined_on_demand(arrive):
    visitor = arrive()
    visitor.begin(num_chunks=8, right="TokenTrim: the paper", seed=1)
    visitor.wait_for_end()
    chunks = json.loads(visitor.download("decisions.json"))["right"]
    trimmed = [index for index, chunk in enumerate(chunks) if chunk["event"] == "trimmed"]
    assert trimmed
    visitor.page.click("#stage .play")
    visitor.page.evaluate(
        f"document.querySelectorAll('#stage video').forEach((v) => v.currentTime = {(3 * trimmed[0] + 1) / 8})"
    )
    visitor.wait_for("document.querySelector('[data-side=right] .frame').classList.contains('trimmed')")
    assert visitor.page.locator("[data-side=right] .marks rect").count() == 0
    visitor.page.click("#stage .more summary")
    visitor.page.check("#stage .outline")
    assert visitor.page.locator("[data-side=right] .marks rect.inner").count() == len(chunks[trimmed[0]]["tokens"])


def test_measure_reports_a_video_and_refuses_other_files(arrive, tmp_path):
    grey = np.linspace(0, 200, 30).astype(np.uint8)
    VideoWriter(tmp_path / "fade.mp4", 8).write(np.tile(grey[:, None, None, None], (1, 64, 64, 3)))
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "fade.mp4").read_bytes()[:300])
    visitor = arrive()
    visitor.page.get_by_role("tab", name="Measure").click()
    visitor.page.set_input_files("input[type=file]", tmp_path / "broken.mp4")
    visitor.page.get_by_text("broken").first.wait_for()
    visitor.page.click("#measure")
    assert "cannot be decoded" in visitor.sentence()
    visitor.page.reload()
    visitor.page.get_by_role("tab", name="Measure").click()
    VideoWriter(tmp_path / "still.mp4", 8).write(np.full((30, 64, 64, 3), 90, np.uint8))
    visitor.page.set_input_files("input[type=file]", [tmp_path / "fade.mp4", tmp_path / "still.mp4"])
    visitor.page.get_by_text("still").first.wait_for()
    visitor.page.click("#measure")
    visitor.page.wait_for_selector("#report table")
    report = visitor.page.inner_text("#report")
    assert "fade.mp4 drifts: colors end" in report and "still.mp4 does not drift" in report and "%" not in report
    visitor.page.wait_for_selector("#figure img.for-light")
    assert visitor.page.locator("#figure img.for-dark").is_hidden()


def test_first_screen_shows_a_finished_example_and_a_wipe(arrive):
    visitor = arrive()
    visitor.wait_for("document.querySelector('#stage video').currentTime > 0")
    assert "complete" in visitor.told() and visitor.told().startswith("an example")
    assert visitor.page.locator("svg.drift .left-line").get_attribute("d")
    assert not visitor.page.locator("svg.severity").first.is_visible()  # folded away
    visitor.page.click("#stage .view")
    left, right = (visitor.page.locator(f"[data-side={side}] .frame").bounding_box() for side in ("left", "right"))
    assert left == right
    visitor.page.mouse.move(left["x"] + left["width"] / 4, left["y"] + 50)
    share = visitor.page.evaluate(
        "getComputedStyle(document.querySelector('#stage .pictures')).getPropertyValue('--wipe')"
    )
    assert float(share.strip().rstrip("%")) == pytest.approx(25, abs=1)
    visitor.page.click("#stage .view")
    visitor.leave()


def test_each_world_has_its_words_and_examples(arrive):
    visitor = arrive()
    prompt = visitor.page.get_by_label("Prompt", exact=True)
    assert prompt.input_value() == "a fast journey right over hills by noon"
    visitor.page.get_by_text("a slow journey right over hills by night").click()
    assert prompt.input_value() == "a slow journey right over hills by night"
    visitor.pick("One shape over one color")
    assert prompt.input_value() == BLUE
    visitor.page.get_by_label("Object").click()
    visitor.page.get_by_role("option", name="orange ring").click()
    visitor.wait_for("document.querySelector('textarea').value.startsWith('an orange ring')")
    visitor.leave()


@pytest.mark.parametrize("width, theme", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_page_fits_every_screen(browser, address, width, theme, tmp_path):
    """No sideways scrolling; screenshots go to TOKENTRIM_SCREENSHOTS, if it is set."""
    visitor = Visitor(browser, f"{address}?__theme={theme}", viewport={"width": width, "height": 844})
    visitor.page.wait_for_timeout(500)
    folder = os.environ.get("TOKENTRIM_SCREENSHOTS", tmp_path)
    visitor.page.screenshot(path=f"{folder}/first-{width}-{theme}.png")
    visitor.begin(num_chunks=12)
    visitor.wait_for_end()
    visitor.page.screenshot(path=f"{folder}/watch-{width}-{theme}.png", full_page=True)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.context.close()


def test_page_reports_an_invalid_checkpoint(browser, space, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENTRIM_CHECKPOINT", "none")
    with serve(tmp_path, str(space / "app.py")) as (address, log):
        visitor = Visitor(browser, address)
        assert "could not be loaded" in visitor.page.inner_text("body")
        assert visitor.page.is_disabled("#begin") and visitor.page.is_disabled("#stop")
        assert "share=True" not in log.read_text()
        assert "the checkpoint could not be loaded" in log.read_text()  # with its traceback, for whoever serves
        visitor.context.close()
