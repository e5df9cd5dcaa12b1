"""Original files of causal Wan models, made from tiny transformers, and LoRA files for them."""

import torch
from builders import randn, tiny_transformer


TOP = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
BLOCK = {
    **{
        f"{attn}.{name}": f"{original}.{short}"
        for attn, original in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for name, short in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    **{
        f"{attn}.{name}": f"{original}.{name}"
        for attn, original in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for name in ("norm_q", "norm_k")
    },
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}


def original(key: str) -> str:
    """The name of a tensor of Diffusers' transformer in Wan's code."""
    block, table = "", TOP
    if key.startswith("blocks."):
        _, index, key = key.split(".", 2)
        block, table = f"blocks.{index}.", BLOCK
    (name,) = (name for name in table if key == name or key.startswith(f"{name}."))
    return block + table[name] + key.removeprefix(name)


def original_weights(seed: int = 0, wrapped=lambda key: key) -> dict[str, torch.Tensor]:
    state = tiny_transformer(seed).state_dict()
    return {wrapped(original(key)): tensor.clone() for key, tensor in state.items()}


# LoRA

RANK = 4
SHAPES = {name: tuple(tensor.shape) for name, tensor in original_weights().items()}
LINEAR = [name.removesuffix(".weight") for name in SHAPES if name.startswith("blocks") and len(SHAPES[name]) == 2]


def lora_matrices() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every linear module of the blocks."""
    pairs = {}
    for seed, module in enumerate(LINEAR):
        out, width = SHAPES[f"{module}.weight"]
        pairs[module] = (randn(RANK, width, seed=seed), randn(out, RANK, seed=1000 + seed))
    return pairs


def lora_weights(template_a: str, template_b: str, rename=lambda module: module) -> dict[str, torch.Tensor]:
    pairs = {}
    for module, (down, up) in lora_matrices().items():
        pairs[template_a.format(rename(module))] = down
        pairs[template_b.format(rename(module))] = up
    return pairs
