# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Deviation of a bf16 rollout from the same rollout in fp32, with our norms, RoPE and timesteps and with the stock ones.

python -m research.benchmarks.precision
"""

import argparse
import tempfile

import torch
from diffusers import FlowMatchLCMScheduler, WanTransformer3DModel

from research.evaluation.experiment import sample_prompts
from research.evaluation.rollouts import load_pipeline
from tokentrim import TokenTrimPipeline


VARIANTS = ("bf16, exact", "bf16, stock")


class NormInModelDtype(torch.nn.Module):
    """A norm that rounds to its own dtype, as in the stock attention processor."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.to(self.norm.weight.dtype))


def with_stock_precision(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Norms of queries and keys in the model's dtype, so that RoPE rotates rounded values, and fp32 sinusoids."""
    for block in transformer.blocks:
        for attn in (block.attn1, block.attn2):
            attn.norm_q, attn.norm_k = NormInModelDtype(attn.norm_q), NormInModelDtype(attn.norm_k)
    embedder = transformer.condition_embedder
    embedder.timesteps_proj = torch.nn.Sequential(embedder.timesteps_proj)  # a class that the rollout does not replace
    return transformer


def tiny_world(num_videos: int) -> tuple[TokenTrimPipeline, dict]:
    """The tiny world and its prompts."""
    return load_pipeline(), {"prompt": sample_prompts(list(range(num_videos)))}


def random_weights(num_videos: int) -> tuple[TokenTrimPipeline, dict]:
    """A Wan transformer of 8 layers of 12 x 32 with random weights, and random text; Self Forcing's schedule."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=32, text_dim=64, freq_dim=256, ffn_dim=1536, num_layers=8
    )
    pipe = TokenTrimPipeline(None, None, transformer.eval(), None, FlowMatchLCMScheduler(shift=5.0))
    return pipe, {"prompt_embeds": torch.randn(num_videos, 16, 64), "height": 64, "width": 64, "window_size": 21}


def roll_out(pipe: TokenTrimPipeline, arguments: dict, num_videos: int, num_chunks: int) -> torch.Tensor:
    """Untrimmed latents, (B, C, T, H, W), always from the same noise."""
    num_latent_frames = 3 * num_chunks
    pipe.set_progress_bar_config(desc=str(pipe.transformer.dtype))
    return pipe(
        **arguments,
        num_frames=(num_latent_frames - 1) * pipe.vae_scale_factor_temporal + 1,
        generator=[torch.Generator().manual_seed(seed) for seed in range(num_videos)],
        method="plain",
        output_type="latent",
    ).frames.float()


def in_bf16(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Load it as users do: Diffusers keeps some parts in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        return WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def deviation(latents: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Relative root mean square difference of each chunk, median over videos: (chunks,)."""
    error, size = (x.square().unflatten(2, (-1, 3)).mean(dim=(1, 3, 4, 5)).sqrt() for x in (latents - exact, exact))
    return (error / size).median(dim=0).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=40)
    args = parser.parse_args()
    shown = [chunk for chunk in (1, 2, 5, 10, 20, 40) if chunk <= args.chunks]
    table = []
    for name, build in (("tiny world", tiny_world), ("random weights", random_weights)):
        pipe, arguments = build(args.videos)
        exact = roll_out(pipe, arguments, args.videos, args.chunks)
        in_fp32 = pipe.transformer
        for variant in VARIANTS:
            transformer = in_bf16(in_fp32)
            pipe.transformer = with_stock_precision(transformer) if variant == "bf16, stock" else transformer
            latents = roll_out(pipe, arguments, args.videos, args.chunks)
            strayed = deviation(latents, exact)
            table.append((name, variant, [strayed[chunk - 1].item() for chunk in shown]))
    print(f"\nrelative RMS deviation from fp32, median of {args.videos} videos")
    print("{:16}{:14}".format("weights", "transformer") + "".join(f"{f'chunk {chunk}':>10}" for chunk in shown))
    for name, variant, values in table:
        print(f"{name:16}{variant:14}" + "".join(f"{value:10.4f}" for value in values))


if __name__ == "__main__":
    main()
