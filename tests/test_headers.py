"""Weights files by their headers: the dry run, sharded files, and conversion in little memory."""

import json
import os
import subprocess
import sys
from math import prod

import pytest
import torch
from builders import full_pipeline, tiny_transformer
from conftest import ROOT
from originals import original_weights
from safetensors.torch import save_file

from research.benchmarks.conversion import write_sparse
from tokentrim.tools.cli import main
from tokentrim.tools.convert import load_original_transformer
from tokentrim.tools.dry_run import cache_bytes, weight_bytes
from tokentrim.tools.headers import read_header
from tokentrim.tools.original import list_shapes
from tokentrim.tools.presets import MODELS, PRESETS
from tokentrim.tools.tensor_info import DTYPES, TensorInfo
from tokentrim.tools.tensors import write_safetensors


HEAD_DIM = 12
# Wan 1.3B
CONFIG = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "text_dim": 4096,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "num_layers": 30,
}


def write_sharded(folder, weights, num_shards=3, write=save_file):
    """Write like `save_pretrained`; returns the index."""
    folder.mkdir()
    names, weight_map = list(weights), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        write({name: weights[name] for name in names[shard::num_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::num_shards], file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# Headers


def test_headers_of_both_formats_match_the_tensors(tmp_path):
    dtypes = [getattr(torch, name) for name in DTYPES.values()]
    tensors = {str(dtype): torch.zeros(2, 3).to(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "x.safetensors")
    strided = {
        "part": torch.zeros(4, 6)[:, 1:3],
        "parameter": torch.nn.Parameter(torch.zeros(5)),
        "scalar": torch.tensor(1.0),
    }
    torch.save(
        {"model": tensors | strided, "step": 3, "linear": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "x.pt"
    )

    def expected(tensors, file):
        infos = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()
        }
        return {name: TensorInfo(*info, tmp_path / file) for name, info in infos.items()}

    assert read_header(tmp_path / "x.safetensors") == expected(tensors, "x.safetensors")
    header = read_header(tmp_path / "x.pt")
    assert header["model"] == expected(tensors | strided, "x.pt") and header["step"] == 3
    assert header["linear"].keys() == {"weight", "bias"}
    for name, tensor in tensors.items():
        assert header["model"][name].num_bytes == tensor.nbytes


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_reading_runs_no_code_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="tensors alone, .* needs more to be unpickled.*posix.system"):
        read_header(tmp_path / "x.pt")
    assert not (tmp_path / "harmed").exists()


# Sharded files


def test_sharded_files_are_one_model(tmp_path):
    index = write_sharded(tmp_path / "sharded", original_weights())
    expected = tiny_transformer().state_dict()
    for path in (index, index.parent):
        weights = load_original_transformer(path, attention_head_dim=HEAD_DIM).state_dict()
        assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)
    index.unlink()  # the files together
    assert load_original_transformer(index.parent, attention_head_dim=HEAD_DIM).num_parameters() > 20_000


def test_incomplete_sharded_files_raise(tmp_path):
    index = write_sharded(tmp_path / "sharded", original_weights())
    files = sorted(index.parent.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is truncated or something else: it should end at byte"):
        read_header(index)
    files[1].unlink()
    with pytest.raises(
        ValueError, match="`path` must be complete, but .*model-00002-of-00003.safetensors does not exist"
    ):
        read_header(index)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match="`path` must be complete, but the files of .* have no "):
        read_header(index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder with 0 indices and 0 files of safetensors"):
        read_header(tmp_path / "empty")


# Writing


def test_written_files_equal_those_of_safetensors(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
    tensors = {
        f"{name}{number}": torch.randn(3, number + 1).to(dtypes[number]) for name in "ba" for number in range(5)
    }
    tensors["part"] = torch.randn(4, 6)[:, 1:3].contiguous()
    save_file(tensors, tmp_path / "expected.safetensors", {"format": "pt"})
    facts = [{name: getattr(tensor, fact) for name, tensor in tensors.items()} for fact in ("dtype", "shape")]
    write_safetensors(tmp_path / "ours.safetensors", *facts, tensors.get)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


SCRIPT = """
import resource, sys
from tokentrim.tools import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert.convert_checkpoint(*sys.argv[1:4], "self_forcing")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_conversion_needs_memory_for_some_tensors(tmp_path):
    """400 MB in files of 80 MB add less than 160 MB to the memory of Python and PyTorch."""
    config = {**CONFIG, "attention_head_dim": 12, "num_attention_heads": 64, "ffn_dim": 3000, "text_dim": 32}
    config |= {"in_channels": 4, "out_channels": 4, "num_layers": 10}
    shapes = list_shapes(config)
    assert 390e6 < 4 * sum(map(prod, shapes.values())) < 450e6
    index = write_sharded(tmp_path / "sharded", shapes, 5, lambda part, path: write_sparse(path, part))
    full_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "tokentrim").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    arguments = [str(index), str(tmp_path / "base"), str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 160_000  # KiB
    weights = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size > 390e6
    weights.unlink()


# The dry run


def test_dry_run_reads_only_headers(tmp_path):
    """11 GB in a moment, without PyTorch."""
    path = tmp_path / "longlive_base.safetensors"
    write_sparse(path, {f"model.{name}": shape for name, shape in list_shapes(CONFIG).items()}, "F64", 8)
    assert path.stat().st_size > 11e9
    (tmp_path / "tokentrim").symlink_to(ROOT)
    script = "import sys; from tokentrim.tools.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", script, "convert", str(path), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert process.returncode == 0, process.stderr
    for words in (
        "10.6 GiB",
        "30 blocks, width 1536 in 12 heads, 1.42 billion",
        "825 tensors",
        "its path suggests longlive",
    ):
        assert words in process.stdout
    assert "weights 2.6 GiB, cache of 21 latent frames 5.6 GiB" in process.stdout


def test_the_page_of_checkpoints_has_the_table_that_the_command_prints(capsys):
    assert main(["convert", "--check"]) == 0
    table = capsys.readouterr().out
    assert table in (ROOT / "docs" / "checkpoints.md").read_text() and table.count("\n") == len(PRESETS) + 2


def test_memory_is_that_of_the_tensors():
    """Keys and values of 21 latent frames of 1,560 tokens in 30 layers of 1,536 channels, 2 bytes each."""
    assert cache_bytes("self_forcing", MODELS["Wan 1.3B"]) == 2 * 21 * 1560 * 30 * 1536 * 2
    for name, num_parameters in (("Wan 1.3B", 1.42e9), ("Wan 14B", 14.29e9)):
        assert weight_bytes(MODELS[name]) == pytest.approx(2 * num_parameters, rel=0.01)


def test_dry_run_reports_a_file_that_does_not_fit(tmp_path, capsys):
    full_pipeline().save_pretrained(tmp_path / "base")
    torch.save({"generator": original_weights()}, tmp_path / "original.pt")
    arguments = ["convert", str(tmp_path / "original.pt"), "--check", "--base", str(tmp_path / "base")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "generator" in printed and "69 tensors" in printed and "none was made for this size" in printed
    torch.save({"generator": {**original_weights(), "extra": torch.zeros(3)}}, tmp_path / "original.pt")
    assert main(arguments) == 1
    assert "are 1 unexpected: extra" in capsys.readouterr().err
    assert main([*arguments, "--lora", str(tmp_path / "none.pt")]) == 1


def test_dry_run_reports_memory(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["convert", "original.pt", "--preset", "longlive"])
    assert end.value.code == 2 and "are required: --base, --out" in capsys.readouterr().err
