"""The pages: snippets run, commands parse, links resolve, numbers come from the reports, and the English is plain."""

import argparse
import importlib
import inspect
import json
import math
import re
import shlex
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from builders import embeds, far_pipeline, latent_pipeline
from conftest import ROOT
from fresh import Nursery
from packaging.specifiers import SpecifierSet
from PIL import Image

from tokentrim.tokentrim_policies.registry import HOOKS, METHODS, POLICIES, make_method
from tokentrim.tokentrim_views.registry import LAYOUTS
from tokentrim.tools.original import list_shapes
from tokentrim.tools.presets import LARGE, PRESETS, count_held_frames


RESULTS = ROOT / "research" / "RESULTS.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, RESULTS, ROOT / "research" / "README.md"]
CARDS = [*ROOT.glob("checkpoints/*/README.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tools/*.md")]
CARDS += [ROOT / "research" / "training" / "README.md"]
LINKED = [
    *PAGES,
    *(ROOT / "research" / "results").rglob("*.md"),
    *ROOT.glob("research/**/README.md"),
    *ROOT.glob("*/README.md"),
]
LANGUAGES = {"python", "bash", "text", "bibtex", "json"}


class Fence(NamedTuple):
    """A block of code on a page."""

    page: Path
    language: str
    code: str
    needs: str | None  # what the code needs, from the comment before it


def read_fences(page: Path) -> list[Fence]:
    pattern = r"(?:^ *<!-- needs: ([^\n]+) -->\n)?^( *)```([^\n]*)\n(.*?)^\2```$"
    found = re.findall(pattern, page.read_text(), flags=re.M | re.S)
    return [Fence(page, language, textwrap.dedent(code), needs or None) for needs, _, language, code in found]


FENCES = [fence for page in PAGES for fence in read_fences(page)]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Snippets


@pytest.fixture(scope="module")
def nursery():
    with Nursery(HF_HUB_OFFLINE="1") as nursery:
        yield nursery


def page_script(page: Path) -> str:
    """The first snippet of the README, which makes `pipe` and `prompt`, and those of a page; videos of 2 chunks."""
    first = next(fence for fence in FENCES if fence.language == "python")
    own = [fence.code for fence in FENCES if fence.page == page and fence.language == "python" and not fence.needs]
    return re.sub(r"num_frames=\d+", "num_frames=6", "\n\n".join(dict.fromkeys([first.code, *own])))


@pytest.fixture
def clone(tmp_path):
    """This repository with a checkpoint of 2 steps instead of 8."""
    for path in ROOT.iterdir():
        if path.name != "checkpoints":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokentrim").symlink_to(ROOT)
    world = ROOT / "checkpoints" / "travelling-world"
    checkpoint = tmp_path / "checkpoints" / "travelling-world"
    checkpoint.mkdir(parents=True)
    for path in world.iterdir():
        if path.is_dir():
            (checkpoint / path.name).symlink_to(path)
    index = json.loads((world / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "num_inference_steps": 2}))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", dict.fromkeys(fence.page for fence in FENCES if fence.language == "python"), ids=label
)
def test_snippets_run(page, nursery, clone):
    _, warned = nursery.run(page_script(page), clone)
    assert not [line for line in warned if "Error" in line or "deprecat" in line.lower()]


# Commands


class Parsed(Exception):
    """The arguments were parsed; nothing has to run."""


@pytest.fixture
def only_parse(monkeypatch):
    """Commands stop after they have parsed their arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


def read_commands(fence: Fence) -> list[list[str]]:
    """The words of each command, without environment, launcher, redirection and comment."""
    lines = re.split(r"\n|&&", fence.code.replace("\\\n", " "))
    return [words for line in lines if (words := shlex.split(line.split(" > ")[0], comments=True))]


def strip_launcher(words: list[str]) -> list[str]:
    """`accelerate launch -m x`, `torchrun --nproc-per-node 2 x.py` and `python -m x` as [`x`, arguments...]."""
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
    elif words[0] == "torchrun":
        words = words[3:]
    elif words[0] == "python":
        words = words[1:]
    return words[1:] if words[0] == "-m" else words


COMMANDS = [
    (fence, command)
    for fence in FENCES
    if fence.language == "bash"
    for command in map(strip_launcher, read_commands(fence))
]


@pytest.mark.parametrize("fence, command", COMMANDS, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_commands_parse(fence, command, only_parse, monkeypatch):
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(arguments) <= set(targets)
    elif program == "tokentrim" or program.startswith("examples/") or program.startswith("research."):
        module = "tokentrim.tools.cli" if program == "tokentrim" else program.removesuffix(".py").replace("/", ".")
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        module = importlib.import_module(module)
        given = [["generate", "--checkpoint", "tiny", *arguments]] if program == "examples/generate.py" else []
        with pytest.raises(Parsed):
            module.main(*given)
    elif program in ("pytest", "ruff"):
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    else:
        assert fence.needs or command == ["source", ".venv/bin/activate"], f"nothing checks {' '.join(command)!r}"
    for word in arguments:
        inputs = ("configs/", "research/", "checkpoints/", "examples/")
        if fence.needs is None and word.startswith(inputs) and not word.startswith("research/runs/"):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("page", dict.fromkeys(fence.page for fence in FENCES if fence.language == "bash"), ids=label)
def test_page_names_the_environment_before_its_first_command(page):
    text = page.read_text()
    fences = [fence for fence in FENCES if fence.page == page and fence.language == "bash"]
    needed = [word for fence in fences for word, *_ in read_commands(fence) if word not in ("make", "source")]
    before = text[: text.index(f"\n{needed[0]} ")] if needed else "#try-it"
    assert "\nsource .venv/bin/activate" in before or "](../README.md#try-it)" in text


# Pages


def count_words(page: Path) -> int:
    """As `wc -w` counts, tables and code included."""
    return len(page.read_text().split())


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert count_words(ROOT / "README.md") <= 1_100


def test_docs_are_few_and_short():
    assert len(DOCS) <= 11
    assert sum(map(count_words, DOCS)) <= 13_000


# The style rules of this project: what a page says instead is in the comment.
AVOIDED = [
    r"in(?:to)? the place of",  # instead of
    r"one's own|of (?:its|their|your) own\b",  # custom; its, their, your
    r"\b(?:nobody|somebody)\b",  # name the actor: users, we, the pipeline
    r"\bwhat (?:is|was) (?:there|new|not|read|held)\b",  # a noun: finished videos, new content
    r"none that shows|nothing that shows",  # no measurable effect
    r"\bsuch as (?:have|has|are|is)\b",  # which have
    r"\b(?:is|are) told\b",  # is reported
    r"\bno good\b",  # invalid
    r"\bgo(?:es)? on\b|\bwent on\b|\bgoing on\b",  # continues
    r"\btold apart\b|\bbe told from\b",  # distinguished
    r"\b(?:without|with) exception\b",  # always
    r"colour|behaviour|neighbour|\bgrey|\blearnt\b|licence|sceptic",  # American spelling
    r"(?:normal|quant|stabil|material|initial|optim|organ|recogn|equal|final|general)is(?:e|ing|ation)",
]


@pytest.mark.parametrize("page", dict.fromkeys([*PAGES, *CARDS]), ids=label)
def test_pages_avoid_phrases_that_are_hard_to_read(page):
    text = re.sub(r"`[^`]*`", "", prose(page))
    found = [(match[0], pattern) for pattern in AVOIDED for match in re.finditer(pattern, text, flags=re.I)]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_code_is_in_fences_that_the_tests_read(page):
    text = page.read_text()
    fences = [fence for fence in FENCES if fence.page == page]
    assert 2 * len(fences) == len(re.findall(r"^ *```", text, flags=re.M))
    assert {fence.language for fence in fences} <= LANGUAGES
    assert len(re.findall("<!-- needs:", text)) == sum(fence.needs is not None for fence in fences)
    assert not re.search(
        r"^ {4,}(make|python|pip|tokentrim|accelerate|torchrun|pipe|output)\b", prose(page), flags=re.M
    )


LINK = r"\]\(([^)\s]+)\)"


@pytest.mark.parametrize("page", LINKED, ids=label)
def test_links_resolve(page):
    for link in re.findall(LINK, prose(page)):
        file, _, heading = link.partition("#")
        if not file.startswith("http"):
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not heading or heading in heading_ids(target), link


def test_every_page_is_linked_from_another():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in LINKED
        for link in re.findall(LINK, prose(page))
        if not link.startswith(("http", "#"))
    }
    assert set(PAGES) - linked <= {ROOT / "README.md"}


def heading_ids(page: Path) -> list[str]:
    """Anchors of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_readme_picture_moves_and_is_small():
    path = ROOT / "docs" / "plain-and-held.webp"
    assert path.stat().st_size < 4_000_000
    with Image.open(path) as picture:
        assert picture.n_frames > 50 and min(picture.size) >= 500


def test_memory_in_the_readme_is_computed():
    """Weights and cache of three presets, as `tokentrim convert --check` computes them."""
    config = {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "patch_size": (1, 2, 2)}
    large = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
    small = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
    rows = {"LongLive, 1.3B": "longlive", "Self Forcing, 1.3B": "self_forcing", "Krea Realtime, 14B": "krea_realtime"}
    for row, preset in rows.items():
        size = large if preset in LARGE else small
        weights = 2 * sum(map(math.prod, list_shapes({**config, **size}).values()))
        tokens, width = 30 * 52 * count_held_frames(preset), size["num_attention_heads"] * size["attention_head_dim"]
        cache = 2 * size["num_layers"] * tokens * width * 2
        cells = f"| {row} | {weights / 2**30:.1f} GiB | {cache / 2**30:.1f} GiB |"
        assert cells in (ROOT / "README.md").read_text()


def test_layouts_in_the_readme_are_those_that_each_model_takes():
    rolling = {"rollout": "rolling_forcing", "num_inference_steps": 2, "prompt_embeds": embeds()}
    calls = [
        (latent_pipeline(), {"prompt_embeds": embeds()}),
        (latent_pipeline(), rolling),
        (far_pipeline(), {"prompt_embeds": embeds(), "num_frames": 25}),
    ]
    counts = []
    for pipe, call in calls:
        taken = []
        for layout in LAYOUTS:
            settings = {"window_size": 30} if layout in ("window", "attention_bias", "longlive") else {}
            if layout in ("pyramid", "by_head"):
                settings = {"labels": [[0, 0]] * 2, **({"layouts": ["window"]} if layout == "by_head" else {})}
            try:
                pipe.plan(**call, output_type="latent", method="plain", layout={layout: settings})
                taken.append(layout)
            except ValueError as error:
                assert "it needs passes of one chunk" in str(error)
        counts.append(len(taken))
    (row,) = re.findall(r"^\| \[layouts\].*$", (ROOT / "README.md").read_text(), flags=re.M)
    assert row == f"| [layouts](docs/layouts.md) | all {counts[0]} | {counts[1]} | {counts[2]} |"


INTERVAL = r"([+-]0\.\d+)\s+\[([+-]0\.\d+),\s+([+-]0\.\d+)\]"


def read_intervals(reports: str) -> set[tuple[float, ...]]:
    return {tuple(map(float, found)) for found in re.findall(INTERVAL.replace(r"0\.\d+", r"[\d.e-]+"), reports)}


def check_intervals(text: str, known: set[tuple[float, ...]]) -> int:
    """Each interval of a text is one of the known ones, rounded. Returns how many there are."""
    quoted = re.findall(INTERVAL, text)
    for found in quoted:
        digits = len(found[0].split(".")[1])
        assert any(
            all(abs(value - float(text)) <= 0.51 * 10**-digits for value, text in zip(values, found))
            for values in known
        ), found
    return len(quoted)


def test_intervals_come_from_the_reports():
    known = read_intervals("".join(path.read_text() for path in RESULTS.parent.glob("results/*/report.md")))
    older = RESULTS.read_text().split("\n## Older reports\n")[1].split("\n## ")[0]
    counts = {page: check_intervals(page.read_text().replace(older, ""), known) for page in PAGES}
    assert counts[RESULTS] >= 20


def test_intervals_of_older_reports_come_from_the_history():
    older = RESULTS.read_text().split("\n## Older reports\n")[1].split("\n## ")[0]
    (commit,) = re.findall(r"git show\s+(\w+):", older)
    git = ["git", "-C", str(ROOT)]
    names = subprocess.run(
        [*git, "ls-tree", "-r", "--name-only", commit, "research/results"], capture_output=True, text=True
    )
    if names.returncode:
        pytest.skip(f"this clone has no commit {commit}")
    reports = [f"{commit}:{name}" for name in names.stdout.split() if name.endswith("/report.md")]
    shown = subprocess.run([*git, "show", *reports], capture_output=True, text=True, check=True)
    assert check_intervals(older, read_intervals(shown.stdout)) >= 10


def test_results_are_small():
    files = [path for path in (RESULTS.parent / "results").rglob("*") if path.is_file()]
    assert 10 < len(files) and sum(path.stat().st_size for path in files) < 6_000_000


# Recipes


def test_every_preset_has_a_recipe():
    """`tests/test_headers.py` compares the table with the one that `convert --check` prints."""
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    for name in PRESETS:
        assert f"--preset {name} --" in page


# Arguments in files


@pytest.mark.parametrize("name", ["paper", "tokentrim_plus"])
def test_config_files_list_every_setting_of_named_methods(name):
    """Every setting with its default, the same parts in the same order."""
    arguments = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    assert list(arguments) == ["method"] and list(arguments["method"]) == list(METHODS[name])
    for part, settings in arguments["method"].items():
        assert list(settings) == list(inspect.signature({**POLICIES, **HOOKS}[part]).parameters)
    spelled, named = make_method(arguments["method"], {}), make_method(name, {})
    assert spelled.drift_signal == named.drift_signal
    for ours, theirs in zip((*spelled.policies, *spelled.hooks), (*named.policies, *named.hooks), strict=True):
        assert type(ours) is type(theirs) and vars(ours) == vars(theirs)


@pytest.mark.parametrize("page", ["promises.md", "performance.md"])
def test_every_promise_names_a_test_that_exists(page):
    page = (ROOT / "docs" / page).read_text()
    tables = re.findall(r"^\|.*\| test \|\n\|[- |]+\|\n((?:\|.*\|\n)+)", page, flags=re.M)
    rows = "".join(tables).splitlines()
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[-2]) for row in rows]
    assert len(rows) >= 20 and all(named), rows
    for file, test in sum(named, []):
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_constraints_install_on_every_supported_python():
    setup, constraints = ((ROOT / name).read_text() for name in ("setup.cfg", "constraints.txt"))
    (oldest,) = re.findall(r"^python_requires = >=(3\.\d+)$", setup, flags=re.M)
    needs = {}
    for name in re.findall(r"^([\w.-]+)==", constraints, flags=re.M):
        try:
            needs[name] = metadata(name)["Requires-Python"] or ""
        except PackageNotFoundError:  # of another system
            continue
    assert len(needs) > 50
    assert not {name: needed for name, needed in needs.items() if f"{oldest}.0" not in SpecifierSet(needed)}
    tried = re.findall(r"Python :: (3\.\d+)", setup)
    assert tried[0] == oldest and f"Python {', '.join(tried[:-1])} and {tried[-1]}" in constraints


def test_packages_hold_what_publishing_reads():
    """`tests/test_loading.py` installs them; this says which files."""
    setup = (ROOT / "setup.cfg").read_text()
    assert "tokentrim.tools = model_card.md, card_*.md" in setup and "tokentrim = LICENSE, py.typed\n" in setup
    assert {path.name for path in (ROOT / "tools").glob("*.md")} == {
        "model_card.md",
        "card_limits.md",
        "card_results.md",
    }
