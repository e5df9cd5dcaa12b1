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
