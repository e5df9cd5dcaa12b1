"""`tokentrim doctor`: ten lines about a checkpoint, and its faults."""

import json
import shutil

import pytest
import torch
from builders import far_components, full_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae
from conftest import ROOT
from diffusers import AnyFlowFARPipeline, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file

from tokentrim import TokenTrimPipeline
from tokentrim.tools.cli import main
from tokentrim.tools.doctor import OTHER_PROMPTS, judge_order, measure_order
from tokentrim.tools.presets import SIZES


WORLD = ROOT / "checkpoints" / "tiny-world"
TOPICS = [
    "checkpoint",
    "parts",
    "rollout",
    "context",
    "size",
    "schedule",
    "licence",
    "numbers",
    "order",
    "speed",
    "odd",
]


@pytest.fixture
def doctor(capsys):
    """The exit code, and the lines by topic."""

    def doctor(folder, *more):
        code = main(["doctor", str(folder), *more])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == TOPICS
        return code, {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}

    return doctor


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose weights are random."""
    full_pipeline(window_size=6, method="plain").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_doctor_finds_nothing_odd_in_the_shipped_world(doctor):
    code, lines = doctor(WORLD)
    assert code == 0 and lines["odd"] == "nothing"
    for topic, words in {
        "checkpoint": "WanTransformer3DModel, 4 blocks of width 128, 1.2 million parameters",
        "rollout": "self_forcing, chunks of 3 latent frames, 8 steps, method tokentrim_plus, prompts change by keep",
        "context": "window: window_size 15, num_sink_frames 0, relative_positions True",
        "size": "published for 64 x 64; weights",
        "schedule": "shift 3.0, timesteps 1000 955 900 833 750 643 500 300",
        "licence": "apache-2.0",
        "numbers": "all finite",
        "order": "trained chunk by chunk",
        "speed": "6 frames of 64 x 64",
    }.items():
        assert words in lines[topic]


def test_doctor_detects_the_trained_order_of_frames():
    """The world was trained on the past only, so the past helps; the future harms, or helps far less."""
    pipe = TokenTrimPipeline.from_pretrained(WORLD)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle moving right over a blue background"
    call = {"num_frames": 6, "method": "plain", "output_type": "latent", "generator": torch.manual_seed(0)}
    latents, settings = pipe(prompt, **call).frames, {"do_classifier_free_guidance": False, "max_sequence_length": 16}
    past, future = measure_order(pipe, latents, pipe.encode_prompt(prompt, **settings)[0])
    assert past < 0.6 and future > 1.5
    processors = {type(block.attn1.processor).__name__ for block in pipe.transformer.blocks}
    assert processors == {"WanAttnProcessor"}


@pytest.mark.parametrize(
    "past, future, words, odd",
    [
        (0.3, 1.6, "trained chunk by chunk", ""),
        (0.2, 0.6, "trained chunk by chunk", ""),
        (0.6, 1.0, "trained chunk by chunk", ""),
        (0.5, 0.55, "it reads both", "the future helps as well: bidirectional"),
        (0.8, 1.28, "not trained chunk by chunk", "the past does not help: bidirectional"),
        (1.4, 0.4, "not trained chunk by chunk", "the past does not help: bidirectional"),
    ],
)
def test_order_of_frames_is_explained(past, future, words, odd):
    told, found = judge_order(past, future)
    assert told.endswith(words) and odd in " ".join(found) and bool(odd) == bool(found)


def test_doctor_reports_a_plain_wan_folder(doctor, tmp_path):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(), "vae": tiny_vae()}
    WanPipeline(**parts, scheduler=scheduler, transformer=tiny_transformer()).save_pretrained(tmp_path / "wan")
    code, lines = doctor(tmp_path / "wan", "--height", "32", "--width", "48")
    assert code == 1 and "shift 3.0" in lines["schedule"] and "not said in a README.md" in lines["licence"]
    assert "model_index.json says nothing of a rollout" in lines["odd"]
    assert "the past does not help: bidirectional weights, as plain Wan's, or random ones" in lines["odd"]


def test_doctor_reports_an_unusual_shift(doctor, folder, monkeypatch):
    monkeypatch.setitem(SIZES, (2, 24), "Wan 1.3B")
    assert "shift" not in doctor(folder)[1]["odd"]
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "shift": 3.0}))
    code, lines = doctor(folder)
    assert code == 1 and "shift 3.0: causal models of Wan 1.3B were trained with 0.95 or 5" in lines["odd"]


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae"])
def test_doctor_reports_a_missing_part(part, doctor, folder):
    """The command tests the rest without it."""
    shutil.rmtree(folder / part)
    code, lines = doctor(folder)
    assert code == 1 and f"there is no {part}" in lines["odd"] and "all finite" in lines["numbers"]
    assert ("frames of mean" in lines["numbers"]) == (part != "vae")


def test_doctor_reports_weights_that_are_not_finite(doctor, tmp_path):
    pipe = full_pipeline(window_size=6)
    pipe.transformer.blocks[1].attn1.to_q.weight[0, 0] = float("nan")
    pipe.save_pretrained(tmp_path / "broken")
    code, lines = doctor(tmp_path / "broken")
    assert code == 1 and "NaN or Inf in the weights: transformer.blocks.1.attn1.to_q.weight" in lines["odd"]
    assert all(lines[topic].startswith("not tried") for topic in ("numbers", "order", "speed"))


def test_doctor_reports_an_unbounded_cache(doctor, tmp_path):
    full_pipeline(num_frames_per_chunk=3).save_pretrained(tmp_path / "checkpoint")
    assert "no window: the cache grows" in doctor(tmp_path / "checkpoint")[1]["odd"]


def test_anyflow_far(doctor, tmp_path):
    AnyFlowFARPipeline(**far_components()).save_pretrained(tmp_path / "far")
    lines = doctor(tmp_path / "far", "--height", "64", "--width", "96")[1]
    assert "AnyFlowFARTransformer3DModel" in lines["checkpoint"] and lines["order"].startswith("not tested")


def test_doctor_refuses_other_folders(folder, tmp_path, capsys):
    def fails(path, message):
        assert main(["doctor", str(path)]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and message in printed.err.splitlines()[-1], printed.err

    fails(tmp_path, "`checkpoint` must be a folder in Diffusers format, with a model_index.json")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fails(folder, "truncated or something else")
    shutil.rmtree(folder / "transformer")
    fails(folder, "has no transformer")


# The text encoder


def change_text_encoder(folder, change):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def zero_embeddings(weights):
    weights["shared.weight"] = torch.zeros_like(weights["shared.weight"])


def equal_embeddings(weights):
    weights["shared.weight"] = weights["shared.weight"][:1].expand_as(weights["shared.weight"]).contiguous()


def zero_last_norm(weights):
    weights["encoder.final_layer_norm.weight"] = torch.zeros_like(weights["encoder.final_layer_norm.weight"])


@pytest.mark.parametrize("change", [zero_embeddings, equal_embeddings, zero_last_norm])
def test_a_text_encoder_that_does_not_listen_is_odd(change, doctor, tmp_path):
    folder = shutil.copytree(WORLD, tmp_path / "world")
    change_text_encoder(folder, change)
    code, lines = doctor(folder)
    assert code == 1 and "the text encoder does not listen: embeddings of two prompts differ by" in lines["odd"]


def test_a_prompt_that_is_one_of_the_others_is_no_finding(doctor):
    assert doctor(WORLD, "--prompt", OTHER_PROMPTS[0])[1]["odd"] == "nothing"
