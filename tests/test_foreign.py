"""Folders that FastVideo and SGLang wrote: they load as they are, with their fields, to the bits of the original file."""

import json
import shutil

import pytest
import torch
from builders import generators, quiet, tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae
from conftest import ROOT
from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from fresh import Nursery
from originals import original_weights

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_files.bundle import bundle
from tokentrim.tokentrim_files.foreign import CAUSAL_CLASS, ROLLING_CLASS, rollout_settings
from tokentrim.tools.cli import main
from tokentrim.tools.convert import convert_checkpoint
from tokentrim.tools.loading import load_without_weights
from tokentrim.tools.memory import estimate_memory


PROMPT = "a red circle moving right over a blue background"
CALL = {"num_frames": 21, "height": 32, "width": 48, "max_sequence_length": 8, "output_type": "latent"}
# The scheduler of FastVideo's folder; SGLang leaves the base model's there, and does not use it.
THEIRS = {
    "_class_name": "SelfForcingFlowMatchScheduler",
    "num_inference_steps": 1000,
    "shift": 5.0,
    "sigma_min": 0.0,
    "extra_one_step": True,
    "training": True,
}
SGLANG = {"num_frames_per_block": 3, "sliding_window_num_frames": 21, "sink_size": 0}
ROLLING = {"num_frames_per_block": 3, "sliding_window_num_frames": 24, "max_attention_num_frames": 21, "sink_size": 3}
FOLDERS = {  # pipeline, transformer, fields, scheduler, and the preset of the same weights as a .pt file
    "FastVideo": ("WanCausalDMDPipeline", CAUSAL_CLASS, {}, THEIRS, "self_forcing"),
    "SGLang": ("CausalForcingPipeline", CAUSAL_CLASS, SGLANG, None, "self_forcing"),
    "SGLang, framewise": (
        "CausalForcingPipeline",
        CAUSAL_CLASS,
        {**SGLANG, "num_frames_per_block": 1},
        None,
        "causal_forcing_framewise",
    ),
    "SGLang, global": (
        "WanCausalForcingPipeline",
        CAUSAL_CLASS,
        {**SGLANG, "local_attn_size": -1},
        None,
        "causal_forcing",
    ),
    "SGLang, rolling": ("WanRollingForcingPipeline", ROLLING_CLASS, ROLLING, None, "rolling_forcing"),
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder of the base model, bidirectional, which all of these programs begin with."""
    folder = tmp_path_factory.mktemp("base") / "wan"
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(), "vae": tiny_vae()}
    WanPipeline(**parts, scheduler=scheduler, transformer=tiny_transformer()).save_pretrained(folder)
    return folder


@pytest.fixture
def write(wan, tmp_path):
    """Write a folder as these programs do: the base's, with other names and fields."""

    def write(pipeline, transformer, fields, scheduler=None, name="foreign", named=None):
        folder = tmp_path / name
        shutil.copytree(wan, folder)
        index, config = folder / "model_index.json", folder / "transformer" / "config.json"
        said = json.loads(index.read_text()) | {"_class_name": pipeline, "transformer": ["diffusers", transformer]}
        if scheduler is not None:
            said["scheduler"] = ["diffusers", scheduler["_class_name"]]
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        index.write_text(json.dumps(said))
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": named or transformer} | fields))
        return folder

    return write


def latents(pipe, **call):
    for weight in pipe.transformer.parameters():  # the last bits depend on where a file was mapped
        weight.data = weight.data.clone()
    return quiet(pipe)(PROMPT, generator=generators(0), **{**CALL, "method": "plain", **call}).frames


@pytest.fixture(scope="module")
def of_file(wan, tmp_path_factory):
    """Latents of the same weights, converted from an original file, by preset."""
    folder, made = tmp_path_factory.mktemp("original"), {}
    torch.save({"generator": original_weights(1), "generator_ema": original_weights(0)}, folder / "x.pt")

    def of_file(preset):
        if preset not in made:
            convert_checkpoint(folder / "x.pt", wan, folder / preset, preset)
            made[preset] = latents(TokenTrimPipeline.from_pretrained(folder / preset))
        return made[preset]

    return of_file


@pytest.mark.parametrize("name", FOLDERS)
def test_a_foreign_folder_makes_the_latents_of_its_original_file(name, write, of_file, tmp_path):
    *layout, preset = FOLDERS[name]
    pipe = TokenTrimPipeline.from_pretrained(write(*layout))
    assert type(pipe.transformer) is WanTransformer3DModel
    assert type(pipe.scheduler).__name__ == "TokenTrimFlowMatchLCMScheduler" and pipe.scheduler.config.shift == 5.0
    assert latents(pipe).equal(of_file(preset))
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"] and index["window_size"] == 21
    assert latents(TokenTrimPipeline.from_pretrained(tmp_path / "saved")).equal(of_file(preset))


@pytest.mark.parametrize("name", ["FastVideo", "SGLang, rolling"])
def test_foreign_folders_load_in_fresh_processes_without_a_warning(name, write, of_file, tmp_path):
    *layout, preset = FOLDERS[name]
    write(*layout)
    (tmp_path / "tokentrim").symlink_to(ROOT)
    (tmp_path / "one_file.py").write_text(bundle(ROOT / "pipeline_tokentrim.py"))
    script = f"""
import torch
from diffusers import DiffusionPipeline
for code in ("tokentrim", "one_file.py"):
    pipe = DiffusionPipeline.from_pretrained("foreign", custom_pipeline=code, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    for weight in pipe.transformer.parameters():
        weight.data = weight.data.clone()
    generator = [torch.Generator().manual_seed(0)]
    torch.save(pipe({PROMPT!r}, generator=generator, method="plain", **{CALL}).frames, code + ".pt")
"""
    with Nursery() as nursery:
        assert nursery.run(script, tmp_path)[1] == []
    for made in ("tokentrim", "one_file.py"):
        assert torch.load(tmp_path / f"{made}.pt").equal(of_file(preset))


def test_fields_are_settings_that_arguments_override(write):
    fields = {"num_frames_per_block": 2, "local_attn_size": 12, "sink_size": 4, "rope_cache_policy": "relativistic"}
    folder = write("WanCausalDMDPipeline", CAUSAL_CLASS, fields)
    config = TokenTrimPipeline.from_pretrained(folder, window_size=15).config
    assert {
        name: config[name] for name in ("num_frames_per_chunk", "window_size", "num_sink_frames", "relative_positions")
    } == {
        "num_frames_per_chunk": 2,
        "window_size": 15,
        "num_sink_frames": 4,
        "relative_positions": True,
    }
    stock = WanTransformer3DModel.from_pretrained(folder / "transformer")  # by hand, with Diffusers' warning
    assert TokenTrimPipeline(None, None, stock, None, None).config.window_size == 12
    assert rollout_settings(tiny_transformer().config) == {}


def test_every_command_takes_a_foreign_folder(write, tmp_path, capsys):
    folder = write(*FOLDERS["SGLang, rolling"][:4])
    size = ["--height", "32", "--width", "48"]
    main(["doctor", str(folder), *size])
    said = capsys.readouterr().out
    assert "rolling_forcing, chunks of 3 latent frames, 5 steps" in said and "shift 5.0" in said
    assert "nothing of a rollout" not in said
    video = tmp_path / "x.mp4"
    assert (
        main(["generate", PROMPT, "--checkpoint", str(folder), "--out", str(video), "--num-frames", "9", *size]) == 0
    )
    assert video.stat().st_size > 0
    out, card = tmp_path / "published", ["--license", "apache-2.0"]
    assert main(["publish", "you/name", "--checkpoint", str(folder), "--out", str(out), *card]) == 0
    loaded = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert loaded.config.rollout == "rolling_forcing" and type(loaded).__name__ == "TokenTrimPipeline"
    assert load_without_weights(folder).config.rollout == "rolling_forcing"
    call = {"height": 32, "width": 48}
    assert estimate_memory(folder, call, "float32") == estimate_memory(folder, {**call, "window_size": 21}, "float32")
    assert main(["convert", str(folder), "--check"]) == 1
    assert "a folder in Diffusers format needs no conversion" in capsys.readouterr().err
    assert main(["convert", str(folder / "transformer"), "--check"]) == 1
    assert "its folder loads as it is" in capsys.readouterr().err


def test_memory_is_estimated_for_the_window_of_the_fields(write):
    folder = write("WanCausalDMDPipeline", CAUSAL_CLASS, {"local_attn_size": 9})
    call = {"height": 32, "width": 48}
    assert estimate_memory(folder, call, "float32") == estimate_memory(folder, {**call, "window_size": 9}, "float32")


WRONG = {
    "sink 19": (
        {"sink_size": 19},
        "the sink of 19 latent frames .* a chunk of 3 .* do not fit into the 21 of `sliding",
    ),
    "local 2": ({"local_attn_size": 2}, "do not fit into the 2 of `local_attn_size`"),
    "block 0": ({"num_frames_per_block": 0}, "`num_frames_per_block` of its config is 0, which must be an int >= 1"),
    "block true": ({"num_frames_per_block": True}, "`num_frames_per_block` of its config is True"),
    "policy": ({"rope_cache_policy": "mixed"}, "`rope_cache_policy` is 'mixed', which must be 'absolute' or"),
    "Wan 2.2": ({"boundary_ratio": 0.875}, "`boundary_ratio` of its config is 0.875: two transformers"),
    "AnyFlow": ({"r_embedder": True}, "`r_embedder` of its config is True: a second timestep"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradicting_fields_raise(case, write):
    fields, message = WRONG[case]
    with pytest.raises(ValueError, match=f"`transformer` must be that of one causal Wan 2.1 .*{message}"):
        TokenTrimPipeline.from_pretrained(write("WanCausalDMDPipeline", CAUSAL_CLASS, fields))


def test_contradicting_classes_raise(write):
    cases = {
        (
            "WanRollingForcingPipeline",
            CAUSAL_CLASS,
            CAUSAL_CLASS,
        ): "names WanRollingForcingPipeline, which has Rolling",
        (
            "WanCausalDMDPipeline",
            CAUSAL_CLASS,
            ROLLING_CLASS,
        ): "names CausalWanTransformer3DModel and its config Rolling",
        ("WanRollingForcingPipeline", ROLLING_CLASS, "Other3DModel"): "and its config Other3DModel",
    }
    for number, ((pipeline, transformer, named), message) in enumerate(cases.items()):
        folder = write(pipeline, transformer, {}, name=f"wrong-{number}", named=named)
        with pytest.raises(ValueError, match=message):
            TokenTrimPipeline.from_pretrained(folder)
    beyond = {**ROLLING, "sliding_window_num_frames": 18}
    with pytest.raises(
        ValueError, match="`max_attention_num_frames` is 21, above the 18 of `sliding_window_num_frames`"
    ):
        TokenTrimPipeline.from_pretrained(write("WanRollingForcingPipeline", ROLLING_CLASS, beyond))


def test_a_bidirectional_folder_raises_unless_it_says_a_rollout(wan):
    with pytest.raises(
        ValueError, match="must be that of a causal model, but is the WanTransformer3DModel of a bidirec"
    ):
        TokenTrimPipeline.from_pretrained(wan)
    given = TokenTrimPipeline.from_pretrained(wan, rollout="self_forcing")
    other = TokenTrimPipeline.from_pretrained(wan, transformer=tiny_transformer())
    assert latents(given).equal(latents(other))
