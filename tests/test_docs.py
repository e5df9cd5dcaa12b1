"""The pages: snippets run, commands parse, links lead somewhere, numbers are those of the reports."""

import argparse
import importlib
import inspect
import json
import re
import shlex
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from fresh import Nursery
from packaging.specifiers import SpecifierSet

from tokentrim.tokentrim_policies.registry import HOOKS, METHODS, POLICIES, make_method
from tokentrim.tools.presets import LARGE, PRESETS, SIZES, count_held_frames


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    needs: str | None  # what is not here, from the comment before it


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
    """The snippets of a page after the first one of the README, which makes `pipe` and `prompt`; videos of 2 chunks."""
    first = next(fence for fence in FENCES if fence.language == "python")
    own = [fence.code for fence in FENCES if fence.page == page and fence.language == "python" and not fence.needs]
    return re.sub(r"num_frames=\d+", "num_frames=6", "\n\n".join(dict.fromkeys([first.code, *own])))


@pytest.fixture
def clone(tmp_path):
    """This repository, with a checkpoint that takes 2 steps instead of 8."""
    for path in ROOT.iterdir():
        if path.name != "checkpoints":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokentrim").symlink_to(ROOT)
    world = ROOT / "checkpoints" / "tiny-world"
    checkpoint = tmp_path / "checkpoints" / "tiny-world"
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
    """The arguments were understood; nothing is to run."""


@pytest.fixture
def only_parse(monkeypatch):
    """Commands end where they have understood their arguments."""
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
        if fence.needs is None and word.startswith(("configs/", "research/", "checkpoints/", "examples/")):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("page", dict.fromkeys(fence.page for fence in FENCES if fence.language == "bash"), ids=label)
def test_a_page_says_which_environment_its_commands_need_before_the_first(page):
    text = page.read_text()
    fences = [fence for fence in FENCES if fence.page == page and fence.language == "bash"]
    needed = [word for fence in fences for word, *_ in read_commands(fence) if word not in ("make", "source")]
    before = text[: text.index(f"\n{needed[0]} ")] if needed else "#try-it"
    assert "\nsource .venv/bin/activate" in before or "](../README.md#try-it)" in text


# Pages


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_code_is_in_fences_that_are_read(page):
    text = page.read_text()
    fences = [fence for fence in FENCES if fence.page == page]
    assert 2 * len(fences) == len(re.findall(r"^ *```", text, flags=re.M))
    assert {fence.language for fence in fences} <= LANGUAGES
    assert len(re.findall("<!-- needs:", text)) == sum(fence.needs is not None for fence in fences)
    assert not re.search(
        r"^ {4,}(make|python|pip|tokentrim|accelerate|torchrun|pipe|output)\b", prose(page), flags=re.M
    )


@pytest.mark.parametrize("page", LINKED, ids=label)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, heading = link.partition("#")
        if not file.startswith("http"):
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not heading or heading in heading_ids(target), link


def heading_ids(page: Path) -> list[str]:
    """As GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_picture_of_the_readme_is_small():
    assert (ROOT / "docs" / "200-chunks.jpg").stat().st_size < 300_000


INTERVAL = r"([+-]0\.\d+)\s+\[([+-]0\.\d+), ([+-]0\.\d+)\]"


def test_intervals_are_those_of_the_reports():
    reports = "".join(path.read_text() for path in (ROOT / "research" / "results").glob("*/report.md"))
    known = {tuple(map(float, found)) for found in re.findall(INTERVAL.replace(r"0\.\d+", r"[\d.e-]+"), reports)}
    for page in PAGES:
        for found in re.findall(INTERVAL, page.read_text()):
            digits = len(found[0].split(".")[1])
            assert any(
                all(abs(value - float(text)) <= 0.51 * 10**-digits for value, text in zip(values, found))
                for values in known
            ), f"{page.name}: {found}"


# Recipes


def test_every_preset_has_a_recipe():
    """A row of the table with the memory that `--check` tells, and a command."""
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    tokens, sizes = 30 * 52, {name: size for size, name in SIZES.items()}
    for name, settings in PRESETS.items():
        (row,) = re.findall(rf"^\|[^|]*`{name}`[^|]*\|(.*)\|$", page, flags=re.M)
        chunk, _, cache, method, transition = (cell.strip() for cell in row.split("|"))
        assert chunk == f"{settings['num_frames_per_chunk']}, {settings['num_inference_steps']}"
        layers, width = sizes["Wan 14B" if name in LARGE else "Wan 1.3B"]
        assert cache == f"{3 * layers * width * count_held_frames(name) * tokens * 2 / 2**30:.1f} GiB"
        assert method == f"`{settings['method']}`"
        assert transition == f"`{settings.get('prompt_transition', 'keep')}`"
        assert f"--preset {name} " in page


# Arguments in files


@pytest.mark.parametrize("name", ["paper", "tokentrim_plus"])
def test_files_spell_out_named_methods(name):
    """Every setting with its default, the same parts in the same order."""
    arguments = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    assert list(arguments) == ["method"] and list(arguments["method"]) == list(METHODS[name])
    for part, settings in arguments["method"].items():
        assert list(settings) == list(inspect.signature({**POLICIES, **HOOKS}[part]).parameters)
    spelled, named = make_method(arguments["method"], {}), make_method(name, {})
    assert spelled.drift_signal == named.drift_signal
    for ours, theirs in zip((*spelled.policies, *spelled.hooks), (*named.policies, *named.hooks), strict=True):
        assert type(ours) is type(theirs) and vars(ours) == vars(theirs)


@pytest.mark.parametrize("page", ["promises.md", "conformance.md"])
def test_every_promise_names_a_test_that_exists(page):
    page = (ROOT / "docs" / page).read_text()
    rows = [
        line for line in page.splitlines() if line.startswith("|") and "---" not in line and "| test |" not in line
    ]
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[-2]) for row in rows]
    assert len(rows) >= 20 and all(named), rows
    for file, test in sum(named, []):
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_all_versions_that_were_tried_install_on_every_python_that_is_promised():
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
    assert "tokentrim.tools = model_card.md, card_*.md" in setup and "tokentrim = LICENSE\n" in setup
    assert {path.name for path in (ROOT / "tools").glob("*.md")} == {
        "model_card.md",
        "card_limits.md",
        "card_results.md",
    }
