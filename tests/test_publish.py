"""Folders for the Hub, and their cards."""

import ast
import json
import re

import pytest
from builders import full_pipeline
from conftest import ROOT
from huggingface_hub import ModelCard

from tokentrim import __version__
from tokentrim.tokentrim_files.bundle import bundle
from tokentrim.tools.bundle import PIPELINE
from tokentrim.tools.cli import main
from tokentrim.tools.publish import publish


CODE = {"pipeline.py", "pipeline_tokentrim.py"}


def content(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def snippet(card):
    return re.search(r"^```python\n(.*?)^```", card.text, flags=re.M | re.S)[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    full_pipeline(window_size=9).save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlicense: cc-by-nc-sa-4.0\n---\n\n# mine\n\nText, [linked](a.md).\n\n## More\n"
    )
    return folder


def test_publish_without_a_checkpoint(tmp_path):
    card = publish("you/code", tmp_path)
    assert content(tmp_path) == CODE | {"LICENSE", "README.md"}
    assert (tmp_path / "pipeline_tokentrim.py").read_text() == bundle(PIPELINE)
    assert (tmp_path / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()

    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.to_dict() == card.data.to_dict()
    data = written.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-video", "apache-2.0")
    assert "tokentrim" in data.tags and "arxiv:2602.00268" in data.tags
    code = snippet(written)
    ast.parse(code)
    assert 'custom_pipeline="you/code"' in code and f'custom_revision="v{__version__}"' in code


def test_publish_with_a_checkpoint(checkpoint, tmp_path):
    """Weights are copied byte by byte; license and text come from the checkpoint's card."""
    publish("you/both", tmp_path, checkpoint, revision="v2", prompt="a red circle")
    assert content(tmp_path) == CODE | content(checkpoint) | {"LICENSE"}
    for file in content(checkpoint) - {"README.md", "model_index.json"}:
        assert (tmp_path / file).read_bytes() == (checkpoint / file).read_bytes()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_tokentrim", "TokenTrimPipeline"] and index["window_size"] == 9
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]  # the pipeline lifts it

    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.license == "cc-by-nc-sa-4.0" and "The weights: cc-by-nc-sa-4.0." in written.text
    assert "# mine" not in written.text and "Text, linked." in written.text and "\n### More" in written.text
    assert 'from_pretrained("you/both", revision="v2", trust_remote_code=True)' in snippet(written)
    assert 'pipe("a red circle"' in snippet(written)


def test_cards_have_no_relative_links_or_template_syntax(checkpoint, tmp_path):
    for number, card in enumerate(
        (publish("you/code", tmp_path / "code"), publish("you/both", tmp_path / "both", checkpoint))
    ):
        sections = re.split(r"^## (.*)\n", card.text, flags=re.M)[1:]
        assert sections[::2] == ["License", *(["These weights"] if number else ["Measured results"]), "Limits"]
        assert all(len(text.strip()) > 10 for text in sections[1::2])
        assert not re.search(r"\]\((?!https:)", card.text) and "{{" not in card.text and "{%" not in card.text
        assert "\n\n\n" not in card.text


def test_card_of_weights_has_no_toy_numbers(checkpoint, tmp_path):
    card = publish("you/both", tmp_path, checkpoint)
    assert "toy" not in card.text and not re.search(r"\d%|0\.0\d", card.text)


def test_numbers_of_the_card_come_from_the_reports(tmp_path):
    text = publish("you/code", tmp_path).text
    for report, numbers in {
        "paper": ["+0.001129 [-0.006153, +0.009272]", "0.06143", "| tokentrim | 4.5% | 81% |"],
        "plus": ["| plain | 0.0467 |", "| held for good | 0.0149 | -0.0318 [-0.0379, -0.0261] |"],
        "change": ["| plain | 41.76 |", "| held for good | 8.204 |"],  # 20%
    }.items():
        assert all(n in (ROOT / "research" / "results" / report / "report.md").read_text() for n in numbers)
    for number in (
        "+0.0011 [-0.0062, +0.0093]",
        "0.0614",
        "0.0467 to 0.0149",
        "-0.0318 [-0.0379, -0.0261]",
        "20%",
    ):
        assert number in text


@pytest.mark.parametrize(
    "prompt", ['a "red" circle', "back\\slash\\", "two\nlines\r```\n", "{{ repo_id }} 🦊 é\u2028", "\udcff"], ids=ascii
)
def test_snippets_are_python_for_any_prompt(prompt, tmp_path):
    publish("you/code", tmp_path / "out", prompt=prompt, revision='v"1')
    calls = [
        node
        for node in ast.walk(ast.parse(snippet(ModelCard.load(tmp_path / "out" / "README.md"))))
        if isinstance(node, ast.Call)
    ]
    values = {node.value for call in calls for node in ast.walk(call) if isinstance(node, ast.Constant)}
    assert {prompt, 'v"1'} <= values


def test_failure_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("tokentrim.tools.publish.name_classes", fail)
    with pytest.raises(OSError, match="No space left"):
        publish("you/both", tmp_path / "out", checkpoint)
    assert not list(tmp_path.iterdir())


def test_bad_input_raises(checkpoint, tmp_path):
    for repo_id in ("no-owner", "you/a b", "you/a/b", ""):
        with pytest.raises(ValueError, match="`repo_id` must be a name like 'you/name'"):
            publish(repo_id, tmp_path / "out")
    with pytest.raises(ValueError, match="`out` must be a new or an empty folder"):
        publish("you/code", checkpoint)
    with pytest.raises(ValueError, match="`checkpoint` must be a folder with a model_index.json"):
        publish("you/both", tmp_path / "out", checkpoint / "transformer")
    with pytest.raises(ValueError, match="`license` must be None or 'apache-2.0' for the code alone, but is 'mit'"):
        publish("you/code", tmp_path / "out", license="mit")
    card = (checkpoint / "README.md").read_text()
    (checkpoint / "README.md").unlink()
    with pytest.raises(ValueError, match="`license` must be given"):
        publish("you/both", tmp_path / "out", checkpoint)
    (checkpoint / "README.md").write_text(card)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    arguments = ["publish", "you/code", "--out", str(tmp_path / "out"), "--revision", "v7"]
    assert main(arguments) == 0
    printed, said = capsys.readouterr()
    assert printed == f"{tmp_path / 'out'}\n"
    assert "hf upload you/code" in said and "hf repos tag create you/code v7" in said
    assert main(arguments) == 1
    assert "tokentrim publish: error: `out` must be a new or an empty folder" in capsys.readouterr().err
