"""The examples in the docstrings of the pipeline run, and print what they say."""

import doctest

import pytest
from conftest import ROOT

from tokentrim import TokenTrimPipeline


@pytest.mark.parametrize("method", ["__call__", "stream"])
def test_example_prints_what_it_says(method, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    docstring = getattr(TokenTrimPipeline, method).__doc__
    lines = [line for line in docstring.splitlines() if "```" not in line]
    code = "\n".join(lines).replace("./pipeline_tokentrim.py", str(ROOT / "pipeline_tokentrim.py"))
    example = doctest.DocTestParser().get_doctest(code, {}, method, None, 0)
    assert len(example.examples) >= 3
    assert doctest.DocTestRunner().run(example).failed == 0
