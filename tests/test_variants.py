"""Bases of a variant, as `save_pretrained(variant=)` writes them: what `convert` makes of them loads."""

import json
import shutil

import pytest
from builders import full_pipeline, tiny_transformer
from originals import original_weights
from safetensors.torch import load_file, save_file

from tokentrim import TokenTrimPipeline
from tokentrim.tools.convert import convert_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "base"
    pipe = full_pipeline()
    pipe.transformer = tiny_transformer(seed=9)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def original(tmp_path):
    save_file(original_weights(), tmp_path / "original.safetensors")
    return tmp_path / "original.safetensors"


def make_variant(base, folder, variant, sharded=False):
    """A copy of a base whose weights are of a variant, as `save_pretrained(variant=)` names them."""
    shutil.copytree(base, folder)
    for part, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        weights = load_file(folder / part / f"{stem}.safetensors")
        (folder / part / f"{stem}.safetensors").unlink()
        if not sharded:
            save_file(weights, folder / part / f"{stem}.{variant}.safetensors", {"format": "pt"})
            continue
        names, weight_map = list(weights), {}
        for shard in range(2):
            file = f"{stem}.{variant}-{shard + 1:05}-of-00002.safetensors"
            save_file({name: weights[name] for name in names[shard::2]}, folder / part / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names[shard::2], file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / part / f"{stem}.safetensors.index.{variant}.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("variant, sharded", [("fp16", False), ("bf16", False), ("non_ema", False), ("fp16", True)])
def test_a_base_of_a_variant_loads_once_it_is_converted(variant, sharded, original, tmp_path, base):
    poor = make_variant(base, tmp_path / "base", variant, sharded)
    convert_checkpoint(original, poor, tmp_path / "out", "self_forcing")
    convert_checkpoint(original, base, tmp_path / "expected", "self_forcing")
    ours, expected = (TokenTrimPipeline.from_pretrained(tmp_path / name) for name in ("out", "expected"))
    for part in ("text_encoder", "vae"):
        weights, others = getattr(ours, part).state_dict(), getattr(expected, part).state_dict()
        assert weights.keys() == others.keys() and all(weights[name].equal(others[name]) for name in weights)


def test_a_base_of_two_variants_or_of_none_is_refused(original, tmp_path, base):
    poor = make_variant(base, tmp_path / "base", "fp16")
    shutil.copy(
        poor / "vae" / "diffusion_pytorch_model.fp16.safetensors",
        poor / "vae" / "diffusion_pytorch_model.bf16.safetensors",
    )
    both = "has diffusion_pytorch_model.bf16.safetensors, diffusion_pytorch_model.fp16.safetensors"
    with pytest.raises(ValueError, match=f"`base` must be .*{both}"):
        convert_checkpoint(original, poor, tmp_path / "out", "self_forcing")
    for name in ("bf16", "fp16"):
        (poor / "vae" / f"diffusion_pytorch_model.{name}.safetensors").rename(
            poor / "vae" / f"other.{name}.safetensors"
        )
    with pytest.raises(ValueError, match="`base` must be .*vae has none"):
        convert_checkpoint(original, poor, tmp_path / "out", "self_forcing")
    assert not (tmp_path / "out").exists()


def test_a_variant_beside_the_weights_changes_nothing(original, tmp_path, base):
    rich = shutil.copytree(base, tmp_path / "base")
    shutil.copy(
        rich / "vae" / "diffusion_pytorch_model.safetensors", rich / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    convert_checkpoint(original, rich, tmp_path / "out", "self_forcing")
    TokenTrimPipeline.from_pretrained(tmp_path / "out")
