"""LoRA files merged during conversion: every format gives W + (alpha / rank) B A, and the result of peft."""

import json

import pytest
import torch
from builders import full_pipeline, randn, tiny_transformer
from originals import LINEAR, RANK, SHAPES, lora_matrices, lora_weights, original, original_weights
from safetensors.torch import save_file

from tokentrim.tools.cli import main
from tokentrim.tools.convert import load_original_transformer
from tokentrim.tools.lora import name_module
from tokentrim.tools.original import list_shapes


HEAD_DIM, ALPHA = 12, 6.0
TO_DIFFUSERS = {
    original(key).removesuffix(".weight"): key.removesuffix(".weight") for key in tiny_transformer().state_dict()
}


def wrapped(module: str) -> str:
    blocks, number, rest = module.split(".", 2)
    return f"{blocks}.{number}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}"


def write_longlive(folder, scaled):
    state = lora_weights("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", wrapped)
    torch.save({"generator_lora": state, "step": 3000}, folder / "lora.pt")
    return folder / "lora.pt"


def write_peft(folder, scaled):
    state = lora_weights("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA if scaled else RANK}))
    return folder


def write_adapter_in_memory(folder, scaled):
    torch.save(lora_weights("model.{}.lora_A.default.weight", "model.{}.lora_B.default.weight"), folder / "lora.pt")
    return folder / "lora.pt"


def write_diffusers(folder, scaled):
    state = lora_weights("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", TO_DIFFUSERS.get)
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(settings)} if scaled else {})
    save_file(state, folder / "pytorch_lora_weights.safetensors", metadata)
    return folder / "pytorch_lora_weights.safetensors"


def write_with_alphas(folder, scaled):
    state = lora_weights("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight")
    state |= {f"diffusion_model.{module}.alpha": torch.tensor(ALPHA) for module in LINEAR if scaled}
    save_file(state, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def write_kohya(folder, scaled, prefix="lora_unet_", rename=str):
    """As kohya's and musubi's trainers: "_" for each "."."""
    state = {
        f"{prefix}{rename(module).replace('.', '_')}.{matrix}": tensor
        for module, pair in lora_matrices().items()
        for matrix, tensor in zip(("lora_down.weight", "lora_up.weight"), pair)
    }
    names = {key.rpartition(".lora_down")[0] for key in state if ".lora_down" in key}
    state |= {f"{name}.alpha": torch.tensor(ALPHA) for name in names if scaled}
    save_file(state, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def write_kohya_of_diffusers(folder, scaled):
    return write_kohya(folder, scaled, "lora_transformer_", TO_DIFFUSERS.get)


def write_alphas_that_are_numbers(folder, scaled):
    state = lora_weights("{}.lora_A.weight", "{}.lora_B.weight") | {
        f"{module}.alpha": ALPHA for module in LINEAR if scaled
    }
    torch.save(state, folder / "lora.pt")
    return folder / "lora.pt"


LAYOUTS = [write_longlive, write_peft, write_adapter_in_memory, write_diffusers, write_with_alphas]
LAYOUTS += [write_kohya, write_kohya_of_diffusers, write_alphas_that_are_numbers]
HAS_ALPHA = [write_peft, write_diffusers, write_with_alphas, *LAYOUTS[-3:]]


def merged(alpha: float) -> dict[str, torch.Tensor]:
    weights = original_weights()
    for module, (down, up) in lora_matrices().items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + alpha / RANK * (up @ down)
    return weights


@pytest.fixture
def model(tmp_path):
    torch.save(original_weights(), tmp_path / "original.pt")
    return tmp_path / "original.pt"


def load(path, **kwargs):
    return load_original_transformer(path, attention_head_dim=HEAD_DIM, **kwargs)


# What comes out


@pytest.mark.parametrize(
    "write, scaled", [(write, False) for write in LAYOUTS] + [(write, True) for write in HAS_ALPHA]
)
def test_every_lora_format_merges(write, scaled, model, tmp_path):
    """Without an alpha, it is the rank. Weights that the LoRA does not change stay equal, bit by bit."""
    lora = write(tmp_path, scaled)
    weights, plain = load(model, lora=lora).state_dict(), load(model).state_dict()
    expected = merged(ALPHA if scaled else RANK)
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[original(key)], rtol=1e-5, atol=1e-5)
        assert weight.equal(plain[key]) != (original(key).removesuffix(".weight") in LINEAR)


def test_merged_model_equals_peft(model, tmp_path):
    peft = pytest.importorskip("peft")
    modules = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    adapted = tiny_transformer()
    adapted.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules))
    for seed, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.3 * randn(*parameter.shape, seed=seed)
    adapted.save_lora_adapter(tmp_path / "adapter")
    inputs = (randn(1, 4, 3, 4, 6), torch.tensor([500.0]), randn(1, 8, 32))
    expected, plain = (transformer(*inputs).sample for transformer in (adapted, tiny_transformer()))
    (lora,) = (tmp_path / "adapter").glob("*.safetensors")
    torch.testing.assert_close(load(model, lora=lora)(*inputs).sample, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def test_half_precision_is_rounded_once(tmp_path):
    """The sum is computed in fp32, whatever the dtypes of the files."""
    weights = {name: tensor.bfloat16() for name, tensor in original_weights().items()}
    torch.save(weights, tmp_path / "original.pt")
    lora = write_longlive(tmp_path, False)
    name = f"{LINEAR[0]}.weight"
    down, up = lora_matrices()[LINEAR[0]]
    expected = (weights[name].float() + up @ down).bfloat16()
    key = next(key for key in tiny_transformer().state_dict() if original(key) == name)
    assert load(tmp_path / "original.pt", lora=lora).state_dict()[key].equal(expected)


def test_conversion_with_a_lora_equals_the_merged_model(model, tmp_path, caplog):
    """The same folder, byte by byte."""
    full_pipeline().save_pretrained(tmp_path / "base")
    lora = write_longlive(tmp_path, False)
    merged_model = load(model, lora=lora).state_dict()
    torch.save({original(key): tensor for key, tensor in merged_model.items()}, tmp_path / "merged.pt")
    arguments = ["--base", str(tmp_path / "base"), "--preset", "longlive"]
    assert main(["convert", str(model), "--lora", str(lora), "--out", str(tmp_path / "ours"), *arguments]) == 0
    assert "20 weights, rank 4, alpha as the rank, since none is given" in caplog.text
    assert main(["convert", str(tmp_path / "merged.pt"), "--out", str(tmp_path / "expected"), *arguments]) == 0
    files = sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*") if path.is_file())
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_diffusers_names_are_known():
    for key, name in ((key, original(key)) for key in tiny_transformer().state_dict()):
        if name.endswith(".weight") and len(SHAPES[name]) == 2:
            assert name_module(f"transformer.{key}") == f"{name_module(name)}"
            assert name_module(name) == name


# Wrong files


def change(state: dict, **changes: torch.Tensor | None) -> dict:
    return {key: tensor for key, tensor in (state | changes).items() if tensor is not None}


FIRST = f"base_model.model.{LINEAR[0]}"
GOOD = lora_weights("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")
BAD_FILES = {
    "no LoRA": (
        original_weights(),
        "whose keys are MODULE.lora_A.weight .* but .* has 69 other keys, such as head.modulation",
    ),
    "empty": ({}, "is empty"),
    "list": ([torch.zeros(1)], "a LoRA file, but .* holds a list"),
    "half": (change(GOOD, **{f"{FIRST}.lora_B.weight": None}), rf"two matrices .* no {{'B'}} of {LINEAR[0]}"),
    "another rank": (
        change(GOOD, **{f"{FIRST}.lora_A.weight": torch.zeros(3, 24)}),
        rf"whose {LINEAR[0]} is \(24, 24\), but in .* A is \(3, 24\) and B is \(24, 4\)",
    ),
    "another width": (
        change(GOOD, **{f"{FIRST}.lora_A.weight": torch.zeros(4, 32)}),
        r"of this model, .* A is \(4, 32\)",
    ),
    "another model": (
        {
            "blocks.7.self_attn.q.lora_A.weight": torch.zeros(4, 24),
            "blocks.7.self_attn.q.lora_B.weight": torch.zeros(24, 4),
        },
        "is for blocks.7.self_attn.q, which it does not have",
    ),
    "more than a LoRA": (
        change(GOOD, **{"blocks.0.norm3.diff": torch.zeros(24)}),
        "1 other keys, such as blocks.0.norm3.diff",
    ),
    "two": (change(GOOD, **{f"{FIRST}.lora_A.other.weight": torch.zeros(4, 24)}), f"two A of {LINEAR[0]}"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_raise(case, model, tmp_path):
    content, message = BAD_FILES[case]
    torch.save(content, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=f"`lora` must be .*{message}"):
        load(model, lora=tmp_path / "lora.pt")


@pytest.mark.parametrize(
    "setting, value",
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("alpha_pattern", {"blocks.0.attn1.to_q": 4}),
        ("rank_pattern", {"blocks.0.attn1.to_q": 2}),
    ],
)
def test_unsupported_lora_settings_raise(setting, value, model, tmp_path):
    folder = write_peft(tmp_path, True)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, setting: value}))
    with pytest.raises(ValueError, match=f"`lora` must be a LoRA with one alpha and one rank, .* have {setting}"):
        load(model, lora=folder)


def test_missing_lora_raises(model, tmp_path):
    with pytest.raises(ValueError, match="`lora` must be .*none.pt does not exist"):
        load(model, lora=tmp_path / "none.pt")


def test_failure_leaves_nothing(model, tmp_path, capsys):
    full_pipeline().save_pretrained(tmp_path / "base")
    torch.save({}, tmp_path / "lora.pt")
    arguments = ["convert", str(model), "--lora", str(tmp_path / "lora.pt"), "--base", str(tmp_path / "base")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--preset", "longlive"]) == 1
    assert "error: `lora` must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_shapes_must_match_the_model():
    assert list_shapes(tiny_transformer().config) == SHAPES


# Alpha and names that are none

ALPHAS = {
    "not a number": torch.tensor(float("nan")),
    "infinite": torch.tensor(float("-inf")),
    "two": torch.tensor([6.0, 7.0]),
    "none": torch.zeros(0),
    "a matrix": torch.ones(2, 2),
    "truth": torch.tensor(True),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("case", ALPHAS)
def test_an_alpha_is_one_finite_number(case, suffix, model, tmp_path):
    state = lora_weights("{}.lora_A.weight", "{}.lora_B.weight") | {f"{LINEAR[-1]}.alpha": ALPHAS[case]}
    path = tmp_path / f"lora.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with pytest.raises(ValueError, match=f"`lora` must be a LoRA .*alpha.*{path.name} .*{LINEAR[-1]}.alpha is "):
        load(model, lora=path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "6", None, [6], True, {"x": 6}, 10**400])
def test_an_alpha_of_settings_is_one_finite_number(value, model, tmp_path):
    folder = write_peft(tmp_path, True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": value}))
    with pytest.raises(
        ValueError, match="`lora` must be a LoRA whose alpha is a finite number, .*adapter_config.json"
    ):
        load(model, lora=folder)


@pytest.mark.parametrize("text", ["", "[1]", "7", "{", '{"r": 4,}', '"x"'])
def test_settings_that_are_none_name_their_file(text, model, tmp_path):
    folder = write_peft(tmp_path, True)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="`lora` must be .*adapter_config.json"):
        load(model, lora=folder)


@pytest.mark.parametrize("rank", [RANK + 1, "4", 4.0])
def test_a_rank_of_settings_is_that_of_the_matrices(rank, model, tmp_path):
    folder = write_peft(tmp_path, True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": ALPHA}))
    with pytest.raises(ValueError, match="`lora` must be .*rank"):
        load(model, lora=folder)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_unet_blocks_99_self_attn_q.lora_down.weight",
        "blocks.0.self_attn.q.lokr_w1",
        "blocks.0.self_attn.q.hada_w1_a",
        "blocks.0.self_attn.q.diff",
        "blocks.0.self_attn.q.dora_scale",
    ],
)
def test_other_adapters_are_refused_by_name(key, model, tmp_path):
    state = lora_weights("{}.lora_A.weight", "{}.lora_B.weight") | {key: torch.ones(RANK, 24)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="`lora` must be .*lora.safetensors ") as error:
        load(model, lora=tmp_path / "lora.safetensors")
    assert key.split(".")[0] in str(error.value)
    assert "lora_down" in key or "pipe.load_lora_weights" in str(error.value)
