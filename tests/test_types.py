"""What editors and type checkers know of the package, as a user's script sees it."""

import inspect
import subprocess
import sys
import typing

import pytest
from conftest import ROOT

import tokentrim
from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_session.keywords import CallArguments


GOOD = """
from tokentrim import LAYOUTS, METHODS, ContextPolicy, Layout, TokenTrimPipeline

pipe = TokenTrimPipeline.from_pretrained("checkpoint")
print(list(METHODS), list(LAYOUTS))


class Mine(ContextPolicy):
    def close(self, entered: bool) -> dict[str, int]:
        return {"mine": self.video}


class Newest(Layout):
    def keep(self, held: list[int], new: list[int]) -> list[int]:
        return held[-3:]


pipe.plan("a fox", num_frames=81, method={"tokentrim": {}})
with pipe.stream("a fox", num_frames=None, method=Mine(), layout=Newest(), state_dir="run") as stream:
    for chunk in stream:
        print(chunk.index + 1, chunk.decisions[0]["trim"])
    reveal_type(stream)
"""
BAD = {  # a line that replaces the one with `plan`, and what mypy says of it
    'pipe.stream("a fox", num_frame=81)': 'Unexpected keyword argument "num_frame" for "stream"',
    'pipe.stream("a fox", num_frames="81")': 'Argument "num_frames" to "stream" of "TokenTrimPipeline"',
    'pipe.stream("a fox", save_every="10")': 'Argument "save_every" to "stream" of "TokenTrimPipeline"',
    'pipe.plan("a fox", rollouts="self_forcing")': 'Unexpected keyword argument "rollouts" for "plan"',
    'pipe("a fox", window_size=1.5)': 'Argument "window_size" to "__call__" of "TokenTrimPipeline"',
}
PLAN = next(line for line in GOOD.splitlines() if "plan" in line)
CONFIG = """
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-numpy.*,transformers.*,diffusers.*,tqdm.*]
follow_imports = skip
"""
TORCH = """
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

class no_grad:
    def __call__(self, function: Function) -> Function: ...

def __getattr__(name: str) -> Any: ...
"""  # of its own types, which take mypy a minute, those of the decorator


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """mypy over a script beside the installed package."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "tokentrim").symlink_to(ROOT)
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.pyi").write_text(TORCH)

    def run(script):
        (folder / "script.py").write_text(script)
        command = [sys.executable, "-m", "mypy", "script.py"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return result.stdout + result.stderr

    return run


def test_mypy_accepts_a_users_script(check):
    printed = check(GOOD)
    assert 'Revealed type is "tokentrim.tokentrim_session.stream.Stream"' in printed
    assert "Success" in printed, printed


def test_mypy_finds_wrong_arguments(check):
    printed = check(GOOD.replace(PLAN, "\n".join(BAD)))
    assert f"Found {len(BAD)} errors" in printed, printed
    for message in BAD.values():
        assert message in printed


def test_arguments_as_types_are_those_of_the_call():
    parameters = list(inspect.signature(TokenTrimPipeline.__call__).parameters.values())[1:]
    types = {parameter.name: parameter.annotation for parameter in parameters if parameter.name != "prompt"}
    assert typing.get_type_hints(CallArguments) == types


def test_dir_shows_public_names_and_each_can_be_imported():
    assert dir(tokentrim) == sorted(tokentrim.__all__)
    assert {"METHODS", "LAYOUTS", "TokenTrimPipeline"} <= set(tokentrim.__all__)
    assert all(getattr(tokentrim, name) is not None for name in tokentrim.__all__)


def test_names_for_type_checkers_are_the_public_names():
    source = (ROOT / "__init__.py").read_text()
    assert all(f"{name} as {name}" in source for name in tokentrim.__all__)
    assert (ROOT / "py.typed").is_file()
