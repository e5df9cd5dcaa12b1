# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Effect of FlowMo on its objective in the first chunk of the tiny world, and its cost in time and memory.

python -m research.benchmarks.flowmo
"""

import argparse
import time
from collections.abc import Callable

import torch

from research.evaluation.experiment import sample_prompts
from research.evaluation.rollouts import load_pipeline
from tokentrim import FlowMo, TokenTrimPipeline
from tokentrim.tokentrim_policies.flowmo import guide, motion_variance


class StoredFlowMo(FlowMo):
    """Without gradient checkpointing."""

    def __call__(self, latents: torch.Tensor, predict_x0: Callable, transformer: torch.nn.Module) -> torch.Tensor:
        transformer.requires_grad_(False)
        return guide(latents, predict_x0, self.iterations, self.learning_rate)


def first_chunk(pipe: TokenTrimPipeline, prompts: list[str], *hooks: FlowMo) -> tuple[torch.Tensor, float]:
    """Latents (B, C, 3, H, W), and seconds."""
    start = time.perf_counter()
    latents = pipe(
        prompts,
        num_frames=3,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="latent",
        method=list(hooks),
    ).frames
    return latents, time.perf_counter() - start


def stored_bytes(pipe: TokenTrimPipeline, prompts: list[str], checkpoint: bool) -> int:
    """Bytes that one gradient step keeps for its backward pass, without the transformer's weights."""
    weights = {parameter.data_ptr() for parameter in pipe.transformer.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first_chunk(pipe, prompts, (FlowMo if checkpoint else StoredFlowMo)(steps=[0]))
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = sample_prompts(list(range(args.videos)))
    plain, _ = first_chunk(pipe, prompts)  # and warm up
    before = motion_variance(plain)
    print(f"first chunks of {args.videos} videos; against no FlowMo in the same run, medians of {args.repeats}")
    print(f"{'iterations':>12}{'learning rate':>15}{'objective':>12}{'lower in':>10}{'seconds':>10}")
    for iterations, learning_rate in ((1, 0.005), (5, 0.005), (5, 0.05)):
        ratios = []
        for _ in range(args.repeats):
            seconds_plain = first_chunk(pipe, prompts)[1]
            guided, seconds = first_chunk(pipe, prompts, FlowMo(iterations=iterations, learning_rate=learning_rate))
            ratios.append(seconds / seconds_plain)
        after = motion_variance(guided)
        print(
            f"{iterations:12}{learning_rate:15}{(after / before).median().item():11.3f}x"
            f"{(after < before).float().mean().item():10.0%}{torch.tensor(ratios).median().item():9.2f}x"
        )
    stored = [stored_bytes(pipe, prompts, checkpoint) / 2**20 for checkpoint in (False, True)]
    print("stored for the backward pass: {:.1f} MiB, with gradient checkpointing {:.1f} MiB".format(*stored))


if __name__ == "__main__":
    main()
