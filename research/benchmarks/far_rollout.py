# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""AnyFlow-FAR rollouts of this pipeline (gate shut) and of Diffusers' pipeline, on the same weights and noise, in turns.

python -m research.benchmarks.far_rollout

Four contestants: upstream; ours; ours with upstream's flex attention, which isolates the effect of the incremental context;
and ours with a window. Each first runs once untimed, because torch traces upstream's attention for every new shape. Ratios
are upstream's seconds, or tokens in its forwards, divided by the contestant's.
"""

import argparse
import ctypes
import gc
import re
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler
from diffusers.utils import logging

from tokentrim import TokenTrimPipeline


STEPS = 4
PARTITION = (1, 3, 3, 3, 3, 3, 3, 2)  # partition of the released checkpoints, 81 frames
WINDOW = 21  # latent frames in the contestant with a window
CONTESTANTS = ("upstream", "ours", "ours, flex", "ours, window")


def random_model(heads: int, layers: int, device: str) -> AnyFlowFARTransformer3DModel:
    """Random weights in the released checkpoints' layout, narrower."""
    torch.manual_seed(0)
    transformer = AnyFlowFARTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * 32 * heads,
        num_layers=layers,
        chunk_partition=PARTITION,
    )
    return transformer.eval().requires_grad_(False).to(device)


def build(pipeline_class: type, transformer: AnyFlowFARTransformer3DModel):
    pipe = pipeline_class(None, None, transformer, None, FlowMapEulerDiscreteScheduler(shift=5.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def partition(num_frames: int) -> list[int]:
    """The checkpoint's partition, extended: one latent frame, then three per chunk."""
    num_latent_frames = (num_frames - 1) // 4 + 1
    num_chunks, rest = divmod(num_latent_frames - 1, 3)
    return [1] + [3] * num_chunks + [rest] * (rest > 0)


class PeakMemory:
    """Peak memory in bytes above the start: allocated on a GPU, otherwise resident (Linux)."""

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"

    @staticmethod
    def resident(name: str) -> int:
        """`VmRSS`, the current value, or `VmHWM`, the peak."""
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def __enter__(self):
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # return free memory to the system
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current value
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else self.resident("VmHWM")
        self.bytes = peak - self.before


@contextmanager
def counted_tokens(transformer: AnyFlowFARTransformer3DModel) -> Iterator[list[int]]:
    """A list of the tokens in each forward inside the block."""
    tokens = []
    hook = transformer.blocks[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    yield tokens
    hook.remove()


def roll_out(transformer, contestant: str, latents: torch.Tensor, text: torch.Tensor, sizes: list[int]):
    """Latents, and the time at which each chunk was finished, in seconds from the start."""
    finished = []

    def callback(pipe, step, timestep, tensors):
        if step == STEPS - 1:
            if latents.is_cuda:
                torch.cuda.synchronize()
            finished.append(time.perf_counter() - start)
        return {}

    arguments = {
        "latents": latents,
        "prompt_embeds": text,
        "height": 8 * latents.shape[3],
        "width": 8 * latents.shape[4],
        "num_frames": 4 * latents.shape[2] - 3,
        "num_inference_steps": STEPS,
        "chunk_partition": sizes,
        "output_type": "latent",
        "callback_on_step_end": callback,
    }
    if contestant != "upstream":
        arguments |= {"method": "plain", "window_size": WINDOW if contestant == "ours, window" else None}
    pipe = build(AnyFlowFARPipeline if contestant == "upstream" else TokenTrimPipeline, transformer)
    backend = "flex" if contestant == "ours, flex" else None
    for block in transformer.blocks if backend else ():
        block.attn1.processor._attention_backend = backend
    try:
        start = time.perf_counter()
        return pipe(**arguments).frames, finished
    finally:
        for block in transformer.blocks if backend else ():
            del block.attn1.processor._attention_backend


def compare(transformer, num_frames: int, size: tuple[int, int], repeats: int, device: str) -> dict[str, dict]:
    """Cost of a length for each contestant."""
    sizes = partition(num_frames)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, sum(sizes), *size, generator=generator).to(device)
    text = torch.randn(1, 16, 64, generator=generator).to(device)
    results = {contestant: {"finished": [], "memory": []} for contestant in CONTESTANTS}
    for contestant, result in results.items():
        with counted_tokens(transformer) as tokens:
            result["frames"], _ = roll_out(transformer, contestant, latents, text, sizes)
        result["tokens"] = sum(tokens)
    for _ in range(repeats):
        for contestant, result in results.items():
            with PeakMemory(device) as memory:
                _, finished = roll_out(transformer, contestant, latents, text, sizes)
            result["finished"].append(finished)
            result["memory"].append(memory.bytes)
    for result in results.values():
        result["seconds"] = statistics.median(finished[-1] for finished in result["finished"])
        by_chunk = zip(*([b - a for a, b in zip([0.0, *finished], finished)] for finished in result["finished"]))
        result["chunk_seconds"] = [min(seconds) for seconds in by_chunk]  # other work on the machine only adds seconds
        result["difference"] = (result["frames"] - results["upstream"]["frames"]).abs().max().item()
    return results


def parity(device: str) -> list[tuple[str, int, float, float]]:
    """(mode, batch, guidance, maximum difference from upstream) on a small model, 7 chunks, 240 tokens a chunk."""
    transformer, sizes = random_model(2, 2, device), [1, 3, 3, 3, 3, 3, 1]
    table = []
    for mode, num_given in (("T2V", 0), ("I2V", 1), ("V2V", 4)):
        for batch in (1, 3):
            for guidance in (1.0, 3.0):
                generator = torch.Generator().manual_seed(1)
                noise = torch.randn(batch, 16, sum(sizes), 16, 20, generator=generator).to(device)
                text, negative = torch.randn(2, batch, 16, 64, generator=generator).to(device)
                given = torch.randn(batch, num_given, 16, 16, 20, generator=generator).to(device)
                arguments = {
                    "latents": noise,
                    "prompt_embeds": text,
                    "negative_prompt_embeds": negative if guidance > 1 else None,
                    "guidance_scale": guidance,
                    "video_latents": given if num_given else None,
                    "height": 128,
                    "width": 160,
                    "num_frames": 4 * sum(sizes) - 3,
                    "num_inference_steps": STEPS,
                    "chunk_partition": sizes,
                    "output_type": "latent",
                }
                theirs = build(AnyFlowFARPipeline, transformer)(**arguments).frames
                ours = build(TokenTrimPipeline, transformer)(**arguments, method="plain").frames
                table.append((mode, batch, guidance, (ours - theirs).abs().max().item()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 161, 241, 481])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=[16, 16], help="height and width of the latents")
    parser.add_argument("--heads", type=int, default=4, help="of 32 channels each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 1000  # enough recompilations, so that upstream does not fall back
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.layers} layers of",
        end=" ",
    )
    print(f"{args.heads} x 32, latents of {args.size[0]} x {args.size[1]}, {STEPS} steps, fp32\n")

    print("method='plain' against AnyFlowFARPipeline\nmode  batch  guidance  max difference")
    for mode, batch, guidance, difference in parity(args.device):
        print(f"{mode:4}{batch:7}{guidance:10.1f}{difference:16.1e}")

    transformer = random_model(args.heads, args.layers, args.device)
    print(f"\nmedian of {args.repeats} runs, taking turns")
    print("frames  chunks  contestant       seconds  s/chunk   ratio  tokens  max difference  peak MiB")
    for num_frames in args.frames:
        results = compare(transformer, num_frames, tuple(args.size), args.repeats, args.device)
        upstream = results["upstream"]
        for contestant, result in results.items():
            ratios = (upstream[key] / result[key] for key in ("seconds", "tokens"))
            per_chunk = result["seconds"] / len(result["chunk_seconds"])
            print(
                f"{num_frames:6}{len(result['chunk_seconds']):8}  {contestant:14}{result['seconds']:10.2f}{per_chunk:9.3f}"
                + "{:8.2f}{:8.2f}".format(*ratios)
                + f"{result['difference']:16.1e}{statistics.median(result['memory']) / 2**20:10.1f}",
                flush=True,
            )
    print(f"\nseconds of a chunk in {num_frames} frames: least of the runs, mean of the chunks")
    ranges = [(first, first + 10) for first in range(0, len(upstream["chunk_seconds"]), 10)]
    ranges = [
        (first, min(last, len(upstream["chunk_seconds"])))
        for first, last in ranges
        if first + 5 <= len(upstream["chunk_seconds"])
    ]
    print(f"{'contestant':14}" + "".join(f"{f'{first}-{last - 1}':>10}" for first, last in ranges))
    for contestant, result in results.items():
        means = (statistics.mean(result["chunk_seconds"][first:last]) for first, last in ranges)
        print(f"{contestant:14}" + "".join(f"{mean:10.4f}" for mean in means))


if __name__ == "__main__":
    main()
