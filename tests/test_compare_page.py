"""The report of `tokentrim compare` in a real browser, opened from the disk: headless Chromium, driven by Playwright.

make test-app     # on Debian after `apt-get install chromium`
"""

import json
import os
import shutil

import numpy as np
import pytest

from tokentrim.tokentrim_frames.mp4 import VideoWriter
from tokentrim.tools.compare.making import film_strip
from tokentrim.tools.compare.report import write_report
from tokentrim.tools.compare.results import LINES, Results
from tokentrim.tools.drift import measure_video


playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not in this environment: `make test-app`"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: `apt-get install chromium`", allow_module_level=True)

FRAMES, FPS = 72, 12
DRIFTS = {"plain": 60, "tokentrim": 58, "tokentrim_plus": 4}  # levels that a video brightens by
PROMPTS = [
    "a lighthouse </script> above the sea",
    "a red fox trots through fresh snow, seen from a low camera beside it",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A finished comparison of videos that brighten."""
    out = tmp_path_factory.mktemp("comparison")
    ramp, noise = np.linspace(0, 1, FRAMES), np.random.default_rng(0)
    lines = []
    for method, drift in DRIFTS.items():
        for number, prompt in enumerate(PROMPTS):
            for seed in (1000 * number, 1000 * number + 1, 1000 * number + 2):
                picture = noise.integers(40, 160, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
                frames = (picture + drift * ramp[:, None, None, None]).round().astype(np.uint8)
                file = f"videos/{method}/{number:02}-{seed}.mp4"
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                VideoWriter(out / file, FPS).write(frames)
                (out / file).with_suffix(".jpg").write_bytes(film_strip(list(frames[::6])))
                measured = measure_video(file, iter(frames))
                lines.append(
                    {
                        "method": method,
                        "prompt_number": number,
                        "prompt": prompt,
                        "seed": seed,
                        "file": file,
                        "num_frames": FRAMES,
                        "fps": FPS,
                        "size": [64, 64],
                        "measures": measured.measures(),
                        "ends": measured.ends.tolist(),
                        "distances": measured.distances().tolist(),
                        "events": {"held": 22} if method == "tokentrim_plus" else {},
                        "seconds": 2.0,
                        "calls": 100,
                        "memory": 2**30,
                        "batch": 3,
                        "machine": "a machine",
                        "versions": {"tokentrim": "0"},
                    }
                )
    (out / LINES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {
        "checkpoint": "checkpoints/none",
        "weights": "0123456789abcdef",
        "dtype": "float32",
        "methods": {method: {"method": method} for method in DRIFTS},
        "prompts": PROMPTS,
        "settings": {},
        "chunks": 24,
        "seeds": 3,
        "first_seed": 0,
        "top": 1.0,
        "batch": 3,
    }
    write_report(Results(out), about)
    return out / "report.html"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, report):
    contexts = []

    def visit(width=1280, theme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=theme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(report.as_uri())
        page.wait_for_selector("video")
        return page

    yield visit
    for context in contexts:
        context.close()


def times(page):
    return page.evaluate(
        "[...document.querySelectorAll('.prompt')[0].querySelectorAll('video')].map((video) => video.currentTime)"
    )


def test_the_verdict_is_read_first_and_nothing_is_requested_from_elsewhere(visit):
    page = visit()
    assert page.inner_text("h1").startswith("On these weights tokentrim_plus drifts least: colors end ")
    assert page.locator(".growing").is_hidden() and page.inner_text("h3 >> nth=0") == PROMPTS[0]
    page.wait_for_timeout(500)
    assert page.errors == [] and all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)


def test_the_table_sorts_by_each_column(visit):
    page = visit()
    names = "[...document.querySelectorAll('.methods tbody th')].map((cell) => cell.textContent)"
    assert page.evaluate(names) == ["tokentrim_plus", "tokentrim", "plain"]  # the least drift first
    page.click(".methods thead button >> nth=1")
    assert page.evaluate(names) == ["plain", "tokentrim", "tokentrim_plus"]
    assert page.get_attribute(".methods thead th >> nth=1", "aria-sort") == "descending"
    page.click(".methods thead button >> nth=0")
    assert page.evaluate(names) == ["plain", "tokentrim", "tokentrim_plus"]


def test_videos_play_and_scrub_together(visit):
    page = visit()
    page.wait_for_function(
        "[...document.querySelectorAll('video')].slice(0, 3).every((video) => video.readyState >= 2)"
    )
    page.click(".bar button >> nth=0")
    page.wait_for_function("document.querySelector('video').currentTime > 0.5")
    now = times(page)
    assert len(now) == 3 and max(now) - min(now) < 0.3
    page.click(".bar button >> nth=0")
    page.wait_for_timeout(200)
    assert page.evaluate("[...document.querySelectorAll('video')].every((video) => video.paused)")
    page.evaluate(
        "(() => { const bar = document.querySelector('.bar input'); bar.value = 4; bar.dispatchEvent(new Event('input')); })()"
    )
    page.wait_for_function(
        "[...document.querySelectorAll('video')].slice(0, 3).every((video) => Math.abs(video.currentTime - 4) < 0.05)"
    )
    assert (
        page.evaluate("[...document.querySelectorAll('video')].slice(0, 3).map((video) => video.videoWidth)")
        == [64] * 3
    )
    page.select_option("select >> nth=0", "2")
    page.wait_for_function("document.querySelector('video').src.endsWith('00-2.mp4')")
    page.click("summary >> nth=0")
    page.wait_for_function("[...document.querySelectorAll('.strip img')].length === 3")


def test_downloads_hold_the_numbers(visit, report, tmp_path):
    page = visit()
    for name in ("methods.csv", "videos.csv", "comparison.json"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        download.value.save_as(tmp_path / name)
    for name in ("methods.csv", "videos.csv"):
        assert (tmp_path / name).read_bytes() == (report.parent / name).read_bytes()
    assert len(json.loads((tmp_path / "comparison.json").read_text())["videos"]) == 18


@pytest.mark.parametrize("width, theme", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_report_fits_every_screen(visit, width, theme, tmp_path):
    """No sideways scrolling; screenshots go to TOKENTRIM_SCREENSHOTS, if it is set."""
    page = visit(width, theme)
    page.wait_for_timeout(500)
    folder = os.environ.get("TOKENTRIM_SCREENSHOTS", tmp_path)
    page.screenshot(path=f"{folder}/compare-{width}-{theme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
