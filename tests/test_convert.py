"""Original files: every format becomes the model that it came from, and every fault is reported."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from builders import full_pipeline, generators, quiet, tiny_transformer
from conftest import ROOT
from diffusers import FlowMatchLCMScheduler, WanTransformer3DModel
from originals import lora_weights, original_weights
from safetensors.torch import save_file

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_writing import locked
from tokentrim.tools import convert
from tokentrim.tools.cli import main
from tokentrim.tools.convert import convert_checkpoint, load_original_transformer
from tokentrim.tools.presets import PRESETS, SCHEDULES, SIZES


HEAD_DIM = 12
PROMPT = "a red circle moving right over a blue background"
CALL = {"num_frames": 57, "height": 32, "width": 48, "max_sequence_length": 8, "output_type": "latent"}


def in_model(key: str) -> str:
    return f"model.{key}"


def in_fsdp(key: str) -> str:
    """Names as if FSDP wraps the model and each of its blocks."""
    parts = key.split(".")
    if parts[0] == "blocks":
        parts.insert(2, "_fsdp_wrapped_module")
    return ".".join(["model", "_fsdp_wrapped_module", *parts])


def in_everything(key: str) -> str:
    parts = in_fsdp(key).split(".")
    if "blocks" in parts:
        parts.insert(5, "_checkpoint_wrapped_module")
    return ".".join(["_orig_mod", "module", *parts])


EMA, PLAIN = 0, 1  # seeds
LAYOUTS = {
    "self_forcing": lambda: {
        "generator": original_weights(PLAIN, in_model),
        "generator_ema": original_weights(EMA, in_model),
    },
    "rolling_forcing": lambda: {
        "generator": original_weights(PLAIN, in_model),
        "critic": original_weights(2, in_model),
        "generator_ema": original_weights(EMA, in_fsdp),
        "step": 3000,
    },
    "longlive": lambda: {"generator": original_weights(EMA, in_model)},
    "causvid": lambda: {"generator": original_weights(EMA, in_fsdp), "critic": {}},
    "model": lambda: {"model": original_weights(EMA, in_everything)},
    "bare": lambda: original_weights(EMA),
}


def write(tmp_path: Path, content, name: str = "original.pt") -> Path:
    path = tmp_path / name
    torch.save(content, path)
    return path


def load(path: Path, **kwargs) -> WanTransformer3DModel:
    return load_original_transformer(path, **{"attention_head_dim": HEAD_DIM, **kwargs})


def assert_same_weights(transformer, expected):
    weights, expected = transformer.state_dict(), expected.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Wan folder in Diffusers format, with another transformer."""
    folder = tmp_path_factory.mktemp("wan") / "base"
    pipe = full_pipeline()
    pipe.transformer = tiny_transformer(seed=9)
    pipe.save_pretrained(folder)
    return folder


def arguments(path, base, out, preset="self_forcing", *more):
    return ["convert", str(path), "--base", str(base), "--out", str(out), "--preset", preset, *more]


# What is in a file comes out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_format_converts(layout, tmp_path, caplog):
    path = write(tmp_path, LAYOUTS[layout]())
    with caplog.at_level(logging.INFO, logger="tokentrim.convert"):
        transformer = load(path)
    assert_same_weights(transformer, tiny_transformer(EMA))
    assert not transformer.training
    ours, expected = ({k: v for k, v in t.config.items() if k[0] != "_"} for t in (transformer, tiny_transformer()))
    assert ours == expected
    assert ("no EMA" in caplog.text) == ("ema" not in str(LAYOUTS[layout]().keys()))


def test_safetensors(tmp_path):
    path = tmp_path / "original.safetensors"
    save_file(original_weights(EMA, in_model), path)
    assert_same_weights(load(path), tiny_transformer(EMA))


def test_without_ema(tmp_path):
    path = write(tmp_path, LAYOUTS["rolling_forcing"]())
    assert_same_weights(load(path, ema=False), tiny_transformer(PLAIN))
    assert_same_weights(load(path, ema=True), tiny_transformer(EMA))


def test_dtype_leaves_in_fp32_what_diffusers_does(tmp_path, base):
    path = write(tmp_path, LAYOUTS["self_forcing"]())
    assert main(arguments(path, base, tmp_path / "out", "self_forcing", "--dtype", "bfloat16")) == 0
    tiny_transformer(EMA).save_pretrained(tmp_path / "direct")
    converted, direct = (
        WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        for folder in (tmp_path / "out" / "transformer", tmp_path / "direct")
    )
    assert {tensor.dtype for tensor in direct.state_dict().values()} == {torch.float32, torch.bfloat16}
    assert_same_weights(converted, direct)


def test_fp8_values_survive_conversion(tmp_path, base):
    """Unchanged, or cast to another dtype; modules that Diffusers keeps in fp32 are fp32."""
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in original_weights(EMA, in_model).items()}
    save_file(weights, tmp_path / "fp8.safetensors")
    expected = load(tmp_path / "fp8.safetensors").state_dict()
    assert {tensor.dtype for tensor in expected.values()} == {torch.float8_e4m3fn}
    convert_checkpoint(tmp_path / "fp8.safetensors", base, tmp_path / "out", "krea_realtime")
    convert_checkpoint(tmp_path / "fp8.safetensors", base, tmp_path / "bf16", "krea_realtime", dtype=torch.bfloat16)
    for folder in ("out", "bf16"):
        folder = tmp_path / folder / "transformer"
        found = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.bfloat16}
        assert all(tensor.float().equal(expected[name].float()) for name, tensor in found.items())


# The folder


@pytest.mark.parametrize("preset", PRESETS)
def test_folder_stores_the_rollout_settings(preset, tmp_path, base):
    path = write(tmp_path, LAYOUTS["longlive"]())
    convert_checkpoint(path, base, tmp_path / "new" / "out", preset)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]
    index = json.loads((tmp_path / "new" / "out" / "model_index.json").read_text())
    assert {name: index[name] for name in PRESETS[preset]} == PRESETS[preset]
    assert index["scheduler"] == ["diffusers", "FlowMatchLCMScheduler"]


def test_presets_name_the_method_that_was_measured_on_their_weights():
    measured = {preset for preset, settings in PRESETS.items() if settings["method"] == "tokentrim"}
    assert measured == {"self_forcing", "rolling_forcing"}
    assert {settings["method"] for settings in PRESETS.values()} == {"tokentrim", "plain"}


@pytest.mark.parametrize("preset", ["self_forcing", "rolling_forcing"])
def test_presets_are_the_shipped_configs(preset):
    config = json.loads((ROOT / "configs" / f"{preset}.json").read_text())
    assert config == {name: PRESETS[preset][name] for name in config}
    assert set(PRESETS[preset]) - set(config) == {"method"}


OTHER = "a blue square moving left over a green background"


def latents(pipe, **call) -> torch.Tensor:
    return quiet(pipe)(PROMPT, generator=generators(0), **CALL | call).frames


@pytest.mark.parametrize("layout", ["self_forcing", "longlive"])
def test_folder_equals_what_diffusers_writes(layout, tmp_path, base):
    """For the same weights, byte by byte."""
    path = write(tmp_path, LAYOUTS[layout]())
    direct = full_pipeline(FlowMatchLCMScheduler(**SCHEDULES[layout]), **PRESETS[layout])
    direct.save_pretrained(tmp_path / "direct")
    expected = latents(direct)
    direct.transformer = load(path)
    assert torch.equal(latents(direct), expected)

    convert_checkpoint(path, base, tmp_path / "out", layout)
    ours, expected = (tmp_path / folder / "transformer" for folder in ("out", "direct"))
    for file in ("diffusion_pytorch_model.safetensors", "config.json", "../scheduler/scheduler_config.json"):
        assert (ours / file).read_bytes() == (expected / file).read_bytes()
    ours, expected = (json.loads((tmp_path / folder / "model_index.json").read_text()) for folder in ("out", "direct"))
    assert ours == expected | {"height": None, "width": None, "max_sequence_length": None, "fps": 16}


@pytest.mark.parametrize("preset", PRESETS)
def test_converted_weights_make_the_same_latents(preset, tmp_path, base):
    """Converted with a LoRA against merged weights with the preset as arguments, bit by bit, through folders (memory-
    mapped weights have another alignment). The prompt changes during the video."""
    path = write(tmp_path, {"generator": original_weights(EMA, in_model)})
    keys = ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")
    small = {key: 0.1 * tensor for key, tensor in lora_weights(*keys).items()}
    lora = write(tmp_path, {"generator_lora": small}, "lora.pt")
    settings = PRESETS[preset]
    call = {"prompt_schedule": {4: OTHER}, "num_frames": 105 if preset == "rolling_sink" else 57}
    direct = full_pipeline(FlowMatchLCMScheduler(**SCHEDULES[preset]))
    direct.transformer = load(path, lora=lora)
    direct.save_pretrained(tmp_path / "direct")
    convert_checkpoint(path, base, tmp_path / "out", preset, lora=lora)
    ours, expected = (TokenTrimPipeline.from_pretrained(tmp_path / folder) for folder in ("out", "direct"))
    assert torch.equal(latents(ours, **call), latents(expected, **settings, **call))
    plain = full_pipeline(FlowMatchLCMScheduler(**SCHEDULES[preset]))
    assert not torch.allclose(latents(plain, **settings, **call), latents(ours, **call), atol=1e-3)


@pytest.mark.parametrize(
    "preset, timesteps",
    [
        ("self_forcing", [1000, 937.5, 833.3333, 625]),
        ("rolling_forcing", [1000, 952.3810, 882.3529, 769.2308, 555.5556]),
        ("causvid", [1000, 756.7568, 521.7391]),
    ],
)
def test_schedules_are_the_published_ones(preset, timesteps):
    pipe = full_pipeline(FlowMatchLCMScheduler(**SCHEDULES[preset]))
    pipe.scheduler.set_rollout_timesteps(PRESETS[preset]["num_inference_steps"])
    assert pipe.scheduler.timesteps.tolist() == pytest.approx(timesteps, abs=1e-3)


def test_the_command(tmp_path, base):
    """As a user runs it: in a separate process, into an existing empty folder."""
    path = write(tmp_path, LAYOUTS["rolling_forcing"]())
    (tmp_path / "tokentrim").symlink_to(ROOT)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "tokentrim"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    process = subprocess.run([*command, *arguments(path, base, "out", "rolling_forcing")], **options)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "out\n"
    for found in ("generator_ema", "critic, step", "_fsdp_wrapped_module., model.", "'num_layers': 2", "written"):
        assert found in process.stderr
    assert_same_weights(WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer"), tiny_transformer(EMA))


# What is wrong with a file is said, in one error that names it


def without(key, weights):
    return {name: tensor for name, tensor in weights.items() if name != key}


BAD_FILES = {
    "pickle": ({"generator": {}, "config": Path("config.yaml")}, "tensors alone.*pathlib"),
    "list": ([torch.zeros(1)], "laid out as.*holds a list"),
    "no layout": ({"critic": {}, "step": 1}, r"laid out as.*\['critic', 'step'\]"),
    "step among weights": ({"model": {**original_weights(), "step": 1}}, "floating-point.*holds step"),
    "integers": ({**original_weights(), "head.head.bias": torch.zeros(16, dtype=torch.int8)}, "floating-point.*head"),
    "LoRA": ({"generator_lora": {"base_model.model.blocks.0.ffn.0.lora_A.weight": torch.zeros(1)}}, "holds a LoRA"),
    "bare LoRA": ({"base_model.model.blocks.0.ffn.0.lora_B.weight": torch.zeros(1)}, "holds a LoRA"),
    "Diffusers' names": (tiny_transformer().state_dict(), "original names.*no text_embedding.0, time_embedding.0"),
    "two for one": (
        {**original_weights(), "model.head.head.bias": torch.zeros(16)},
        "one key.*two for head.head.bias",
    ),
    "unexpected": (
        {**original_weights(), "img_emb.proj.0.weight": torch.zeros(3), "blocks.0.extra": torch.zeros(3)},
        r"are 2 unexpected: img_emb.proj.0.weight, blocks.0.extra\.",
    ),
    "scaled fp8": (
        {**original_weights(), "blocks.0.ffn.0.scale_weight": torch.ones(1)},
        "are 1 unexpected: blocks.0.ffn.0.scale_weight",
    ),
    "missing": (
        without("blocks.1.norm3.bias", without("head.head.bias", original_weights())),
        r"are 2 missing: blocks.1.norm3.bias, head.head.bias\.",
    ),
    "a block missing": (
        {key: tensor for key, tensor in original_weights().items() if "blocks.0." not in key or "ffn" in key},
        "23 missing.*blocks.0.self_attn.q.weight",
    ),
    "shape": (
        {**original_weights(), "blocks.0.self_attn.q.bias": torch.zeros(5)},
        r"are 1 of another shape: blocks.0.self_attn.q.bias \(5,\) instead of \(24,\)\.",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_raise(case, tmp_path):
    content, message = BAD_FILES[case]
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(error.value).startswith("`path` must be") and str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_truncated_files_raise(suffix, keep, tmp_path):
    path = tmp_path / f"original{suffix}"
    (torch.save if suffix == ".pt" else save_file)(original_weights(), path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"complete .safetensors file.*{path.name} is truncated or something else"):
        load(path)


@pytest.mark.parametrize("part", ["data/3", "data.pkl", ".format_version"])
def test_bit_flips_are_reported(part, tmp_path):
    """PyTorch compares no checksums."""
    path = write(tmp_path, original_weights())
    with zipfile.ZipFile(path) as archive:
        (info,) = [info for info in archive.infolist() if info.filename.endswith(part)]
        content = archive.read(info)
    data = path.read_bytes()
    place = data.index(content, info.header_offset + len(info.filename)) + len(content) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    with pytest.raises(ValueError, match=f"`path` must be .*{path}"):
        load(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_raise(suffix, value, tmp_path, base, fail, nothing_written):
    weights = original_weights()
    weights["blocks.1.ffn.0.weight"][3, 5] = value
    path = tmp_path / f"original{suffix}"
    (torch.save if suffix == ".pt" else save_file)(weights, path)
    fail(
        arguments(path, base, tmp_path / "out"),
        f"`path` must be finite, but blocks.1.ffn.0.weight of {path} holds NaN",
    )


def test_weights_beyond_the_range_of_the_dtype_raise(tmp_path):
    weights = original_weights()
    weights["blocks.1.ffn.0.weight"][3, 5] = 1e6
    with pytest.raises(
        ValueError, match="`dtype` must be one that holds the weights, but blocks.1.ffn.0.weight leaves"
    ):
        load(write(tmp_path, weights), dtype=torch.float16)


def test_zeroed_weights_are_reported(tmp_path, caplog):
    weights = original_weights()
    weights["blocks.1.ffn.0.weight"].zero_()
    load(write(tmp_path, weights))
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "tensors hold nothing but zeros: " in told.message and "blocks.1.ffn.0.weight" in told.message


def test_refused_pickle_names_the_reason(tmp_path):
    torch.save(original_weights(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="bare pickle, as `torch.save` wrote before PyTorch 1.6: save it again"):
        load(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "odd.pt", "w") as archive:
        archive.writestr("odd/data.pkl", b"\x80\xc8.")
    with pytest.raises(ValueError, match="its pickle is damaged: ValueError: unsupported pickle protocol: 200"):
        load(tmp_path / "odd.pt")


def test_wrong_header_raises(tmp_path):
    save_file(original_weights(), tmp_path / "original.safetensors")
    data = (tmp_path / "original.safetensors").read_bytes()
    (tmp_path / "original.safetensors").write_bytes(data.replace(b'"F32"', b'"F16"', 1))
    with pytest.raises(
        ValueError, match="original.safetensors is truncated or something else: its .* but has the offsets"
    ):
        load(tmp_path / "original.safetensors")


def test_files_that_are_not_checkpoints_raise(tmp_path):
    with pytest.raises(ValueError, match="`path`.*none.pt does not exist"):
        load(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="`path`.*is a folder"):
        load(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="`path`.*text.pt is truncated or something else"):
        load(tmp_path / "text.pt")


def test_missing_ema_raises(tmp_path):
    with pytest.raises(ValueError, match="`ema` must be None or False.*only 'generator'"):
        load(write(tmp_path, LAYOUTS["longlive"]()), ema=True)
    with pytest.raises(ValueError, match="`ema` must be None or True.*only 'generator_ema'"):
        load(write(tmp_path, {"generator_ema": original_weights()}), ema=False)


@pytest.mark.parametrize("ema", [{}, None, 3, [1]])
def test_an_ema_that_is_none_names_the_way_out(ema, tmp_path):
    path = write(tmp_path, {"generator": original_weights(), "generator_ema": ema})
    with pytest.raises(ValueError, match="`path` must be .*'generator_ema' is .*; --no-ema takes 'generator'"):
        load(path)
    assert_same_weights(load(path, ema=False), tiny_transformer())
    with pytest.raises(ValueError, match="'generator_ema' is .*; --no-ema would take 'generator', which is missing"):
        load(write(tmp_path, {"generator_ema": ema}))


def test_a_generator_that_is_none_names_the_way_out(tmp_path):
    path = write(tmp_path, {"generator": {}, "generator_ema": original_weights()})
    with pytest.raises(ValueError, match="'generator' is empty; --ema takes 'generator_ema'"):
        load(path, ema=False)
    assert_same_weights(load(path), tiny_transformer())


def test_head_dim_that_does_not_divide_raises(tmp_path):
    with pytest.raises(ValueError, match="`attention_head_dim` must be a divisor of the width 24.*is 128"):
        load_original_transformer(write(tmp_path, LAYOUTS["bare"]()))


# Nothing is half-written


@pytest.fixture
def fail(capsys):
    """Run the command, which must fail with one sentence on stderr."""

    def fail(arguments, message):
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert re.match(f"tokentrim convert: error: {message}", printed.err.splitlines()[-1]), printed.err

    return fail


@pytest.fixture
def nothing_written(tmp_path):
    yield
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae"])
def test_base_without_a_part_raises(part, tmp_path, base, fail, nothing_written):
    path = write(tmp_path, LAYOUTS["bare"]())
    poor = tmp_path / "base"
    poor.mkdir()
    for folder in base.iterdir():
        if folder.name != part:
            (poor / folder.name).symlink_to(folder)
    fail(arguments(path, poor, tmp_path / "out"), f"`base` must be a Wan2.1 folder.*has no {part}/")
    (poor / part).mkdir()
    fail(arguments(path, poor, tmp_path / "out"), f"`base` must be a complete folder.*{part} does not load")


def test_base_of_another_model_raises(tmp_path, base, fail, nothing_written):
    weights = {**original_weights(), "text_embedding.0.weight": torch.zeros(24, 40)}
    fail(
        arguments(write(tmp_path, weights), base, tmp_path / "out"),
        r"`base` must be a folder that fits.*\(40, 4, 4\).*\(32, 4, 4\)",
    )


def test_command_reports_a_bad_file(tmp_path, base, fail, nothing_written):
    path = write(tmp_path, {**original_weights(), "extra": torch.zeros(3)})
    fail(arguments(path, base, tmp_path / "out"), "`path` must be.*1 unexpected: extra")
    fail(
        arguments(write(tmp_path, original_weights()), base, tmp_path / "out", "longlive", "--ema"),
        "`ema` must be None or False",
    )


def test_failure_while_saving_leaves_nothing(tmp_path, base, fail, nothing_written, monkeypatch):
    def run_out_of_space(path, *_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("tokentrim.tools.convert.write_safetensors", run_out_of_space)
    fail(arguments(write(tmp_path, LAYOUTS["bare"]()), base, tmp_path / "out"), "No space left on device")


def test_next_conversion_removes_files_of_a_killed_one(tmp_path, base, fail):
    path = write(tmp_path, LAYOUTS["bare"]())
    pid = os.fork()
    if pid == 0:
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        convert.write_safetensors = kill
        convert_checkpoint(path, base, tmp_path / "out", "longlive")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / ".out.unfinished" / "vae").is_dir() and not (tmp_path / "out").exists()
    with locked(tmp_path / "out", wait=False):
        fail(arguments(path, base, tmp_path / "out"), ".*out is being written by another process")
    convert_checkpoint(path, base, tmp_path / "out", "longlive")
    assert {entry.name for entry in tmp_path.iterdir()} == {"original.pt", "out"}


def test_existing_output_folder_raises(tmp_path, base, fail):
    path = write(tmp_path, LAYOUTS["bare"]())
    fail(arguments(path, base, path), "`out` must be a new or an empty folder, but is ")
    fail(arguments(path, base, tmp_path), "`out` must be a new or an empty folder, but is ")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_preset_of_another_size_raises(tmp_path, base, fail, nothing_written, monkeypatch):
    path = write(tmp_path, LAYOUTS["bare"]())
    monkeypatch.setitem(SIZES, (2, 24), "Wan 14B")
    message = r"`preset` must be one for Wan 14B \(krea_realtime\), but is 'self_forcing', for another size"
    fail(arguments(path, base, tmp_path / "out"), message)
    fail(["convert", str(path), "--check", "--base", str(base), "--preset", "self_forcing"], message)


def test_unknown_preset_raises(tmp_path, base):
    with pytest.raises(ValueError, match="`preset` must be one of.*'longlive'.*is 'wan'"):
        convert_checkpoint(tmp_path / "original.pt", base, tmp_path / "out", "wan")
