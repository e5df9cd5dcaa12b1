"""The bundle. test_loading.py tests that it makes the same latents."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

from tokentrim.tokentrim_files.bundle import bundle, sort_modules
from tokentrim.tools.bundle import PIPELINE
from tokentrim.tools.cli import main


def test_modules_come_after_their_imports():
    modules = sort_modules(PIPELINE)
    rooms = [path for path in ROOT.glob("tokentrim_*/*.py") if path.name != "__init__.py"]
    assert sorted(modules) == sorted([PIPELINE, *ROOT.glob("tokentrim_*.py"), *rooms])
    names = [str(path.relative_to(ROOT).with_suffix("")) for path in modules]
    assert names[-1] == "pipeline_tokentrim"
    assert names.index("tokentrim_kv/cache") < names.index("tokentrim_backbones/wan")


def test_bundling_a_bundle_changes_nothing(tmp_path):
    file = tmp_path / "pipeline_tokentrim.py"
    file.write_text(bundle(PIPELINE))
    assert bundle(file) == file.read_text()


def test_bundle_is_self_contained_and_formatted():
    source = bundle(PIPELINE)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level or "tokentrim" in node.module for node in imports)
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", "bundled.py", "-"]
        process = subprocess.run(ruff, input=source, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr


def test_name_defined_in_two_modules_raises(tmp_path):
    pipeline = tmp_path / "pipeline_tokentrim.py"
    pipeline.write_text('# c\n"""Doc."""\n\nfrom .tokentrim_room.a import b\n\n\ndef c():\n    pass\n')
    (tmp_path / "tokentrim_room").mkdir()
    (tmp_path / "tokentrim_room" / "a.py").write_text('# c\n"""Doc."""\n\nb = 1\n\n\nclass c:\n    pass\n')
    with pytest.raises(RuntimeError, match=r"two modules define \['c'\]"):
        bundle(pipeline)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "tokentrim.py"
    assert main(["bundle", str(file)]) == 0
    assert file.read_text() == bundle(PIPELINE) and capsys.readouterr().out == f"{file}\n"
    assert main(["bundle", str(file)]) == 0  # again
    with pytest.raises(SystemExit) as end:
        main(["bundle", str(tmp_path)])
    assert end.value.code == 2 and "FILE must end with .py" in capsys.readouterr().err


def test_bundle_overwrites_no_other_file_and_shadows_no_package(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pipeline_tokentrim.py"
    file.write_text("mine")
    for name, valid in (
        ("pipeline_tokentrim.py", "a new file or one that"),
        ("tokentrim.py", "of another name or in"),
    ):
        assert main(["bundle", name]) == 1
        assert capsys.readouterr().err.startswith(f"tokentrim bundle: error: `FILE` must be {valid}")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    assert main(["bundle", "new/tokentrim.py"]) == 0
