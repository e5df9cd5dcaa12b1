"""The rooms of the house: who may import whom, and how large things may grow. `docs/architecture.md` draws the same."""

import ast

import pytest
from conftest import ROOT


# Each room, and the rooms that it may import. A name without a room is a module at the root.
MAY_IMPORT = {
    "checks": set(),
    "scheduler": set(),
    "writing": set(),
    "views": {"checks"},
    "policies": {"checks"},
    "frames": {"checks", "writing"},
    "files": {"checks", "writing"},
    "kv": {"checks", "views"},
    "backbones": {"checks", "views", "kv"},
    "session": {"checks", "views", "kv", "backbones", "policies", "frames", "files", "writing"},
}
MODULES = sorted([*ROOT.glob("tokentrim_*.py"), *ROOT.glob("tokentrim_*/*.py")])


def room_of(path):
    return path.relative_to(ROOT).parts[0].removeprefix("tokentrim_").removesuffix(".py")


def relative_imports(path):
    """The files of this project that a file imports, and the statements that import the package by name."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    targets = {
        path.parents[node.level - 1].joinpath(*(node.module or "__init__").split(".")).with_suffix(".py")
        for node in imports
        if node.level
    }
    names = [node.module for node in imports if not node.level and node.module]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return targets, [name for name in names if name.split(".")[0] in ("tokentrim", "research", "tools", "space")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path):
    targets, absolute = relative_imports(path)
    assert absolute == []
    room = room_of(path)
    assert {room_of(target) for target in targets} <= MAY_IMPORT[room] | {room}


def test_imports_have_no_circle():
    imports = {path: relative_imports(path)[0] for path in MODULES}
    free = set()
    while len(free) < len(imports):
        more = {path for path, targets in imports.items() if path not in free and targets <= free}
        assert more, f"a circle among {sorted(set(imports) - free)}"
        free |= more


@pytest.mark.parametrize("folder", ["tools", "space"])
def test_the_command_and_the_page_import_nothing_from_research(folder):
    for path in (ROOT / folder).rglob("*.py"):
        targets, absolute = relative_imports(path)
        assert not any("research" in name for name in absolute)
        assert not any((ROOT / "research") in target.parents for target in targets)


@pytest.mark.parametrize("room", sorted({path.parent for path in MODULES} - {ROOT}), ids=lambda room: room.name)
def test_an_init_is_one_docstring(room):
    """Diffusers' loader copies none of them."""
    (docstring,) = ast.parse((room / "__init__.py").read_text()).body
    assert isinstance(docstring.value.value, str)


# The pipeline's file and the signature of its call are over the limits still.
LIMITS = {"lines of a file": 300, "lines of a function": 40, "parameters": 6}


def functions(path):
    """Name, lines without the docstring, and parameters without `self` of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            length = 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            yield (
                node.name,
                node.end_lineno - node.lineno + 1 - length,
                len(names) - (names[:1] in (["self"], ["cls"])),
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    assert len(path.read_text().splitlines()) <= LIMITS["lines of a file"]
    for name, lines, parameters in functions(path):
        assert lines <= LIMITS["lines of a function"], name
        assert parameters <= LIMITS["parameters"] or name == "__init__", name


def test_functions_of_the_pipeline_are_small():
    for name, lines, parameters in functions(ROOT / "pipeline_tokentrim.py"):
        if name not in ("__init__", "__call__"):
            assert lines <= LIMITS["lines of a function"] and parameters <= LIMITS["parameters"], name
