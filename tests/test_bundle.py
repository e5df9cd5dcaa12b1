"""The single file: that it makes the same latents is a cell of the loading matrix (test_loading.py)."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

from tokentrim.tools.bundle import bundle, sort_modules
from tokentrim.tools.cli import main


def test_every_module_comes_after_those_that_it_imports():
    modules = sort_modules("pipeline_tokentrim")
    assert sorted(modules) == sorted(["pipeline_tokentrim", *(path.stem for path in ROOT.glob("tokentrim_*.py"))])
    assert modules[-1] == "pipeline_tokentrim"
    assert modules.index("tokentrim_cache") < modules.index("tokentrim_attention")


def test_the_file_needs_nothing_of_this_project_and_is_formatted():
    source = bundle()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level or "tokentrim" in node.module for node in imports)
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", "bundled.py", "-"]
        process = subprocess.run(ruff, input=source, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr


def test_names_that_two_modules_define_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "pipeline_tokentrim.py").write_text(
        '# c\n"""Doc."""\n\nfrom .tokentrim_a import b\n\n\ndef c():\n    pass\n'
    )
    (tmp_path / "tokentrim_a.py").write_text('# c\n"""Doc."""\n\nb = 1\n\n\nclass c:\n    pass\n')
    monkeypatch.setattr("tokentrim.tools.bundle.ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=r"defined in two modules: \['c'\]"):
        bundle()


def test_the_command(tmp_path, capsys):
    file = tmp_path / "tokentrim.py"
    assert main(["bundle", str(file)]) == 0
    assert file.read_text() == bundle() and capsys.readouterr().out == f"{file}\n"
    assert main(["bundle", str(file)]) == 0  # again
    with pytest.raises(SystemExit) as end:
        main(["bundle", str(tmp_path)])
    assert end.value.code == 2 and "FILE has to end with .py" in capsys.readouterr().err


def test_no_other_file_is_overwritten_and_the_package_is_not_shadowed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pipeline_tokentrim.py"
    file.write_text("mine")
    for name, valid in (
        ("pipeline_tokentrim.py", "a new file, or one that"),
        ("tokentrim.py", "of another name or in"),
    ):
        assert main(["bundle", name]) == 1
        assert capsys.readouterr().err.startswith(f"tokentrim bundle: error: `FILE` has to be {valid}")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    assert main(["bundle", "new/tokentrim.py"]) == 0
