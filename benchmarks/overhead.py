# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What stands between a user and the denoiser's own arithmetic: rollouts against the same forwards alone.

python -m benchmarks.overhead

The floor is the same forwards of the same token counts against a context that is allocated before: projections, norms,
rotary embedding and attention, nothing else. Contestants take turns chunk by chunk in one process, on the same weights.
A ratio is of one chunk's seconds to the same chunk's of the same repetition; printed is the median of all such pairs with
its 95% interval (of order statistics), and no ratio whose interval holds 1. On a CPU seconds are this process's own,
since those of the clock, printed beside them, contain what else the machine does.
"""

import argparse
import copy
import importlib.util
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import _get_qkv_projections
from diffusers.utils import logging

import tokentrim
from tokentrim.tokentrim_attention import replaced_processors
from tokentrim.tokentrim_memory import grid_places, rotary_angles, rotate


STEPS, CHUNK = 4, 3


@dataclass(frozen=True)
class Size:
    """A random model and what it makes: latents of `latent` (height, width) at 4 tokens of patch 1 x 2 x 2."""

    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    latent: tuple[int, int]
    text: tuple[int, int]  # tokens and channels of a prompt
    window: int = 21
    dtype: torch.dtype = torch.float32

    @property
    def grid(self) -> tuple[int, int]:
        return self.latent[0] // 2, self.latent[1] // 2

    def build(self, device: str) -> WanTransformer3DModel:
        torch.manual_seed(0)
        with torch.device(device):
            transformer = WanTransformer3DModel(
                num_attention_heads=self.heads,
                attention_head_dim=self.head_dim,
                text_dim=self.text[1],
                ffn_dim=self.ffn_dim,
                num_layers=self.layers,
            )
        return transformer.eval().requires_grad_(False).to(self.dtype)


SIZES = {
    "tiny": Size(4, 32, 512, 4, (16, 16), (16, 64)),
    "mid": Size(8, 64, 2048, 8, (16, 28), (64, 256)),
    "1.3b": Size(12, 128, 8960, 30, (60, 104), (512, 4096), dtype=torch.bfloat16),
}


class Floor:
    """The forwards of a plain rollout, chunk by chunk, against a context that is allocated before.

    Args:
        transformer (`WanTransformer3DModel`): gets processors of its own while it iterates.
        size ([`Size`]), window (`int`): of the model, and latent frames that attention spans.
        latents (`torch.Tensor`), text (`torch.Tensor`): as the rollout has them.
    """

    def __init__(self, transformer, size: Size, window: int, latents: torch.Tensor, text: torch.Tensor):
        self.transformer, self.latents, self.text = transformer, latents.to(size.dtype), text.to(size.dtype)
        self.num_tokens = size.grid[0] * size.grid[1]
        self.window = window
        shape = (len(latents), window * self.num_tokens, size.heads, size.head_dim)
        context = torch.zeros(size.layers, 2, *shape, dtype=size.dtype, device=latents.device)
        self.context = context.normal_() * 0.5
        self.held = 0
        rope_dims = (transformer.rope.t_dim, transformer.rope.h_dim, transformer.rope.w_dim)
        place = grid_places(size.grid).repeat(CHUNK, 1)[None]
        time_ = torch.arange(CHUNK).repeat_interleave(self.num_tokens)[None]
        self.angles = rotary_angles(time_, place, rope_dims, latents.device)

    def self_attention(self, layer: int, stock) -> Callable:
        def processor(attn, hidden_states, *_, **__):
            query, key, value = _get_qkv_projections(attn, hidden_states, None)
            query = attn.norm_q(query.float()).unflatten(2, (attn.heads, -1))
            key = attn.norm_k(key.float()).unflatten(2, (attn.heads, -1))
            num_keys = self.held + key.shape[1]
            keys, values = self.context[layer, :, :, :num_keys]
            keys[:, self.held :] = rotate(key, *self.angles)
            values[:, self.held :] = value.unflatten(2, (attn.heads, -1))
            return self.attend(attn, rotate(query, *self.angles).to(value.dtype), keys, values)

        return processor

    def cross_attention(self, layer: int, stock) -> Callable:
        prompt = []

        def processor(attn, hidden_states, encoder_hidden_states, *_, **__):
            if not prompt:
                _, key, value = _get_qkv_projections(attn, hidden_states[:, :0], encoder_hidden_states)
                key = attn.norm_k(key.float()).to(value.dtype)
                prompt.extend(x.unflatten(2, (attn.heads, -1)) for x in (key, value))
            query = attn.norm_q(attn.to_q(hidden_states).float()).unflatten(2, (attn.heads, -1))
            return self.attend(attn, query.to(prompt[1].dtype), *prompt)

        return processor

    def attend(self, attn, query, key, value) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(*heads_first)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2, 3))

    @torch.no_grad()
    def __iter__(self) -> Iterator[None]:
        chunks = self.latents.split(CHUNK, dim=2)
        times = torch.tensor([1000.0, 750.0, 500.0, 250.0, 0.0], device=self.latents.device)
        with replaced_processors(self.transformer, self.self_attention, self.cross_attention):
            for index, chunk in enumerate(chunks):
                self.held = min(index * CHUNK, self.window - CHUNK) * self.num_tokens
                for step in range(STEPS + (index + 1 < len(chunks))):
                    self.transformer(chunk, times[step].expand(len(chunk)), self.text, return_dict=False)
                yield


def rollout(package, transformer, latents: torch.Tensor, text: torch.Tensor, **call) -> Iterator[None]:
    """A stream of `package`, this project's code at one commit."""
    scheduler = package.TokenTrimFlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = package.TokenTrimPipeline(None, None, transformer, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": STEPS, "output_type": "latent", "num_frames_per_chunk": CHUNK, **call}
    with pipe.stream(latents=latents, prompt_embeds=text, **call) as stream:
        for _ in stream:
            yield


def load_checkout(folder: Path):
    """This project as it is in another checkout."""
    spec = importlib.util.spec_from_file_location(
        "before", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = sys.modules["before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def shared(transformer):
    """Another module of the same weights: a rollout owns its transformer."""
    return copy.deepcopy(transformer, {id(each): each for each in (*transformer.parameters(), *transformer.buffers())})


@dataclass
class Seconds:
    """Of each chunk that counts, in order: of the CPU, and of the clock."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def take_turns(contestants: dict[str, Callable], repeats: int, first: int) -> dict[str, Seconds]:
    """Run all contestants `repeats` times, chunk by chunk in turn; chunks from `first` on count."""
    results = {name: Seconds() for name in contestants}
    for repeat in range(repeats):
        running = {name: iter(start()) for name, start in contestants.items()}
        spent: dict[str, list] = {name: [] for name in contestants}
        order = list(contestants)
        while running:
            order = order[1:] + order[:1]
            for name in [each for each in order if each in running]:
                cpu, wall = time.process_time(), time.perf_counter()
                try:
                    next(running[name])
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                except StopIteration:
                    del running[name]
                    continue
                spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        for name, pairs in spent.items():
            results[name].cpu += [cpu for cpu, _ in pairs[first:]]
            results[name].wall += [wall for _, wall in pairs[first:]]
    return results


def ratio(times: list[float], to: list[float]) -> tuple[float, float, float]:
    """Median of paired ratios, and its 95% interval."""
    ratios = sorted(ours / theirs for ours, theirs in zip(times, to))
    low = max(int((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2), 0)
    return statistics.median(ratios), ratios[low], ratios[-1 - low]


def shown(median: float, low: float, high: float) -> str:
    """A ratio with its interval; where it does not differ from 1, the interval alone."""
    return f"[{low:.3f}, {high:.3f}]" if low <= 1 <= high else f"{median:.3f} [{low:.3f}, {high:.3f}]"


def machine(device: str) -> str:
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s)"
    else:
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


def table(results: dict[str, Seconds], on_gpu: bool) -> str:
    """Seconds of a chunk, and the ratios to every contestant before it."""
    lines, names = [f"{'':24}{'CPU s':>9}{'clock s':>9}"], list(results)
    for place, (name, seconds) in enumerate(results.items()):
        line = f"{name:24}{statistics.median(seconds.cpu):9.3f}{statistics.median(seconds.wall):9.3f}"
        for other in names[:place]:
            kind = "wall" if on_gpu else "cpu"
            line += f"   to {other}: " + shown(*ratio(getattr(seconds, kind), getattr(results[other], kind)))
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--window", type=int, nargs="+", default=[12, 21])
    parser.add_argument("--chunks", type=int, default=9)
    parser.add_argument("--first", type=int, default=1, help="chunks before it do not count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--before", type=Path, help="another checkout of this project, to compare with")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    transformer = size.build(args.device)
    parameters = sum(each.numel() for each in transformer.parameters())
    print(f"{machine(args.device)}, {str(size.dtype)[6:]}")
    print(
        f"{args.size}: {parameters / 1e6:.1f}M parameters, {size.grid[0] * size.grid[1]} tokens a frame, {STEPS} steps"
    )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, args.chunks * CHUNK, *size.latent, generator=generator).to(args.device)
    text = torch.randn(1, *size.text, generator=generator).to(args.device)
    for window in args.window:
        call = {"window_size": window, "height": 8 * size.latent[0], "width": 8 * size.latent[1]}
        floor = Floor(shared(transformer), size, window, latents, text)
        contestants = {"floor": lambda floor=floor: floor}
        packages = {"plain": tokentrim} | ({"plain, before": load_checkout(args.before)} if args.before else {})
        for name, package in packages.items():
            model = shared(transformer)
            contestants[name] = partial(rollout, package, model, latents, text, method="plain", **call)
        results = take_turns(contestants, args.repeats, args.first)
        print(f"\nwindow {window}, a chunk of chunks {args.first} to {args.chunks - 1}, {args.repeats} repetitions")
        print(table(results, args.device != "cpu"), flush=True)


if __name__ == "__main__":
    main()
