"""`tokentrim heads`: what heads attend to, their labels, and query statistics."""

import json
import math

import pytest
import torch
from builders import CHUNK, GRID, NUM_TOKENS, latent_pipeline, noise, randn, roll, rope
from conftest import ROOT
from safetensors.torch import load_file

from tokentrim.tokentrim_views.memory import Memory
from tokentrim.tokentrim_views.rope import grid_places
from tokentrim.tools import cli
from tokentrim.tools.commands.heads import is_labels, is_statistics
from tokentrim.tools.heads import (
    ANCHOR,
    VEIL,
    WAVE,
    Head,
    HeadSurvey,
    classify,
    format_heads,
    frame_mass,
    write_labels,
)


def memory_of(frames, key, held=None):
    held = torch.ones(len(frames), NUM_TOKENS, dtype=torch.bool) if held is None else held
    tag = torch.zeros(len(frames), NUM_TOKENS, 3, dtype=torch.long)
    return Memory(frames, held, key, key.clone(), tag, None, grid_places(GRID), (4, 4, 4))


def test_frame_mass_is_the_softmax_over_the_held_past():
    frames, new = [0, 1, 4], [5, 6, 7]
    key, query = randn(3, NUM_TOKENS, 2, 12, seed=1), randn(CHUNK * NUM_TOKENS, 2, 12, seed=2)
    held = torch.ones(3, NUM_TOKENS, dtype=torch.bool)
    held[1, 2] = False
    mass = frame_mass(memory_of(frames, key, held), new, query)
    keys, queries = rope(key.flatten(0, 1)[None], frames)[0], rope(query[None], new)[0]
    for head in range(2):
        scores = queries[:, head] @ keys[:, head].T / math.sqrt(12)
        scores[:, NUM_TOKENS + 2] = -torch.inf
        expected = scores.softmax(dim=-1).view(-1, 3, NUM_TOKENS).sum(dim=-1)
        torch.testing.assert_close(mass[head], expected, atol=1e-5, rtol=0)


def test_survey_sees_all_heads_and_queries_and_changes_nothing():
    survey = HeadSurvey()
    frames = roll(latent_pipeline(), noise(5), method="plain", layout=survey).frames
    assert torch.equal(frames, roll(latent_pipeline(), noise(5), method="plain").frames)
    assert (
        set(survey.shares) == {0, 1} and len(survey.shares[0]) == 1
    )  # of chunk 3, with frames between; 4 is not committed
    for shares in (*survey.shares[0], *survey.shares[1]):
        torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2))
    assert set(survey.profiles[0]) == set(range(1, 9))
    assert (survey.sums[1][3] == 3 * CHUNK * NUM_TOKENS).all()  # queries of chunks 1 to 3


def fading(distance):
    return math.exp(-distance / 5)


@pytest.mark.parametrize(
    ("shares", "profile", "label", "period"),
    [
        ([0.6, 0.2, 0.2], [fading(d) for d in range(1, 25)], ANCHOR, None),
        ([0.1, 0.7, 0.2], [fading(d) for d in range(1, 25)], VEIL, None),
        ([0.6, 0.2, 0.2], [fading(d) * (2 + math.cos(math.pi * d / 3)) for d in range(1, 25)], WAVE, 6),
        ([0.1, 0.2, 0.7], [fading(d) * (2 + math.cos(math.pi * d / 2)) for d in range(1, 25)], WAVE, 4),
        ([0.5, 0.5, 0.0], [0.5, 0.3, 0.2], ANCHOR, 0),  # too short for a period
    ],
)
def test_labels_follow_shares_and_periods(shares, profile, label, period):
    found, lag, strength = classify(torch.tensor(shares), profile)
    assert found == label and strength <= 1
    assert period is None or lag == period


def test_labels_in_a_file_are_those_that_a_layout_reads(tmp_path):
    heads = [Head(layer, head, label, 0.2, 0.3, 0.5, 6, 0.4)
             for layer, head, label in ((0, 0, WAVE), (0, 1, VEIL), (1, 0, ANCHOR), (1, 1, WAVE))]  # fmt: skip
    write_labels(tmp_path / "heads.json", heads)
    ours, written_out = (
        roll(latent_pipeline(), noise(4), method="plain", layout={"pyramid": {"labels": labels}}).frames
        for labels in (str(tmp_path / "heads.json"), [[0, 2], [1, 0]])
    )
    assert torch.equal(ours, written_out)
    assert format_heads(heads).splitlines()[-1].split() == ["all", "2", "1", "1", "20%", "30%", "50%"]


def test_command_writes_labels_and_statistics_of_the_shipped_world(tmp_path, capsys):
    labels, queries = tmp_path / "heads.json", tmp_path / "queries.safetensors"
    checkpoint = ROOT / "checkpoints" / "tiny-world"
    files = ["--labels", str(labels), "--queries", str(queries)]
    assert cli.main(["heads", str(checkpoint), "--prompt", "a red circle", "--chunks", "5", *files]) == 0
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    shape = config["num_layers"], config["num_attention_heads"]
    written = json.loads(labels.read_text())
    assert [len(layer) for layer in written["labels"]] == [shape[1]] * shape[0]
    assert len(capsys.readouterr().out.splitlines()) == shape[0] + 2
    assert {tuple(each.shape) for each in load_file(queries).values()} == {(*shape, config["attention_head_dim"] // 2)}
    assert is_labels(labels) and is_statistics(queries)  # the next start may replace them
    labels.write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["heads", str(checkpoint), "--labels", str(labels)])
    assert stopped.value.code == 2 and "labels that `tokentrim heads` wrote" in capsys.readouterr().err


def test_too_few_chunks_raise_before_a_rollout(capsys):
    assert cli.main(["heads", str(ROOT / "checkpoints" / "tiny-world"), "--chunks", "4"]) == 1
    assert "`--chunks` must be >= 5: a sink, recent frames and some between, but is 4" in capsys.readouterr().err
