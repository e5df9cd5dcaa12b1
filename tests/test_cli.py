"""The command `tokentrim`: help without PyTorch, exit codes, and errors of one sentence."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from tokentrim.tools import cli


COMMANDS = ("generate", "compare", "convert", "doctor", "publish", "bundle", "drift", "heads", "app")


def start(folder, *arguments):
    """In a separate process, with the checkout as the package `tokentrim`."""
    (folder / "tokentrim").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_help_imports_no_heavy_package(tmp_path):
    calls = [["--help"], ["--version"], [], *([command, "--help"] for command in COMMANDS)]
    script = f"""
import sys
from tokentrim.tools.cli import main
for arguments in {calls}:
    try:
        main(arguments)
    except SystemExit as end:
        print("exit", end.code)
heavy = {{"torch", "diffusers", "numpy", "cv2", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    process = start(tmp_path, "-c", script)
    assert process.returncode == 0, process.stderr
    codes = [line for line in process.stdout.splitlines() if line.startswith("exit")]
    assert codes == ["exit 0"] * (2 + len(COMMANDS))  # `tokentrim` alone returns after the help
    assert all(f"\n    {command} " in process.stdout for command in COMMANDS)


def test_python_m(tmp_path):
    process = start(tmp_path, "-m", "tokentrim", "bundle", "one.py")
    assert (process.returncode, process.stdout) == (0, "one.py\n"), process.stderr
    assert "class TokenTrimPipeline(" in (tmp_path / "one.py").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"\n  tokentrim {command} " in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("a sentence"), OSError("a sentence"), KeyboardInterrupt()])
def test_failures_have_no_traceback(error, monkeypatch, capsys):
    def fail(pipeline):
        raise error

    monkeypatch.setattr("tokentrim.tools.bundle.bundle", fail)
    code = cli.main(["bundle", "one.py"])
    printed = capsys.readouterr()
    if isinstance(error, KeyboardInterrupt):
        assert (code, printed.err) == (130, "")
    else:
        assert (code, printed.err) == (1, "tokentrim bundle: error: a sentence\n")
    assert printed.out == ""


def test_defects_have_a_traceback(monkeypatch):
    monkeypatch.setattr("tokentrim.tools.bundle.bundle", lambda _: {}["no such key"])
    with pytest.raises(KeyError):
        cli.main(["bundle", "one.py"])


def test_app_without_gradio_prints_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["app"]) == 1
    assert "`make app`" in capsys.readouterr().err
