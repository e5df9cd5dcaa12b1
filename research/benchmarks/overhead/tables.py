# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The tables, by their names on the command line."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

import tokentrim
from research.benchmarks import far_rollout
from tokentrim.tokentrim_views.registry import LAYOUTS

from .contestants import (
    CHUNK,
    PERIOD,
    EveryTwelfth,
    Floor,
    Size,
    load_checkout,
    rollout,
    shared,
    small_vae,
)
from .timing import Seconds, ratio, shown, table, take_turns


@dataclass(frozen=True)
class Bench:
    """Settings that all tables share.

    Args:
        transformer (`WanTransformer3DModel`), size ([`Size`]), device (`str`): the model.
        repeats (`int`): runs of each contestant.
        chunks (`int`, *optional*): chunks of a run, instead of each table's default.
        windows (`Sequence[int]`): windows of the table `floor`; the other tables use the last one.
        before (`Path`, *optional*): another checkout.
    """

    transformer: WanTransformer3DModel
    size: Size
    device: str
    repeats: int
    chunks: int | None
    windows: Sequence[int]
    before: Path | None

    def inputs(self, num_chunks: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and text of a batch."""
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(batch, 16, num_chunks * CHUNK, *self.size.latent, generator=generator)
        return latents.to(self.device), torch.randn(batch, *self.size.text, generator=generator).to(self.device)

    def full_window(self) -> tuple[int, int]:
        """The first chunk that reads the whole last window, and the chunks of a run with six of these."""
        first = self.windows[-1] // CHUNK + 1
        return first, self.chunks or first + 6

    def contestant(
        self,
        num_chunks: int,
        batch: int = 1,
        package: Any = tokentrim,
        transformer: WanTransformer3DModel | None = None,
        **call,
    ) -> Callable:
        """A function that starts a rollout; by default plain, in the last window, on a separate model."""
        size = {"height": 8 * self.size.latent[0], "width": 8 * self.size.latent[1]}
        window = {} if "layout" in call else {"window_size": self.windows[-1]}
        model = shared(self.transformer) if transformer is None else transformer
        inputs = self.inputs(num_chunks, batch)
        return partial(rollout, package, model, *inputs, **{"method": "plain", **window, **size, **call})

    def run(
        self,
        title: str,
        contestants: dict[str, Callable],
        num_chunks: int,
        first: int,
        references: Sequence[str],
        sum_of: int = 1,
    ) -> dict[str, Seconds]:
        """Let contestants take turns, and print their table."""
        results = take_turns(contestants, self.repeats, first)
        counted = {name: seconds.summed(sum_of) for name, seconds in results.items()}
        of = "a chunk" if sum_of == 1 else f"{sum_of} chunks"
        print(f"\n{title}: {of} of chunks {first} to {num_chunks - 1}, {self.repeats} repetitions")
        print(table(counted, self.device, references), flush=True)
        return results


def floor(bench: Bench) -> None:
    """The plain rollout against its forwards, and against another commit."""
    num_chunks = bench.chunks or 9
    for window in bench.windows:
        inputs = bench.inputs(num_chunks)
        alone = Floor(shared(bench.transformer), bench.size, window, *inputs)
        contestants = {"floor": lambda alone=alone: alone}
        packages = {"plain": tokentrim} | ({"plain, before": load_checkout(bench.before)} if bench.before else {})
        for name, package in packages.items():
            contestants[name] = bench.contestant(num_chunks, package=package, window_size=window)
        bench.run(f"window {window}", contestants, num_chunks, min(3, num_chunks - 1), ["floor", "plain"])


def gate(bench: Bench) -> None:
    """The cost of the gate, and of one trigger in `PERIOD` chunks."""
    first = PERIOD // 2
    num_chunks = bench.chunks or first + 2 * PERIOD
    contestants = {"shut": bench.contestant(num_chunks)}
    for signal in ("first_step", "final"):
        settings = {"drift_sensitivity": 1e6, "drift_signal": signal}
        contestants[f"open, {signal}"] = bench.contestant(num_chunks, method={"tokentrim": settings})
        contestants[f"triggers, {signal}"] = bench.contestant(num_chunks, method=EveryTwelfth(signal))
    bench.run(f"gate, 1 trigger in {PERIOD} chunks", contestants, num_chunks, first, ["shut"], PERIOD)


def plus(bench: Bench) -> None:
    """`tokentrim_plus` against plain."""
    first, num_chunks = bench.full_window()
    contestants = {name: bench.contestant(num_chunks, method=name) for name in ("plain", "tokentrim_plus")}
    bench.run(f"window {bench.windows[-1]}", contestants, num_chunks, first, ["plain"])


def layouts(bench: Bench) -> None:
    """Every named layout with its own window."""
    first, num_chunks = bench.full_window()
    contestants = {"plain": bench.contestant(num_chunks)}
    for name in LAYOUTS:
        if name != "window":  # plain already runs
            contestants[name] = bench.contestant(num_chunks, layout=name)
    title = f"plain in window {bench.windows[-1]}, layouts in their own"
    bench.run(title, contestants, num_chunks, first, ["plain"])


def long(bench: Bench) -> None:
    """Time and memory of a chunk late in a video against an early one."""
    num_chunks, span = bench.chunks or 400, 40
    memory: dict[str, list[float]] = {}

    def note(stream, name):
        layers = [stream.run.backbone.cache.layer(layer) for layer in range(bench.size.layers)]
        held = sum(2 * layer.key.nbytes for layer in layers if layer.key is not None)
        memory.setdefault(name, []).append(held / 2**20)

    names = ("plain", "tokentrim", "tokentrim_plus")
    contestants = {name: bench.contestant(num_chunks, method=name, between=partial(note, name=name)) for name in names}
    results = take_turns(contestants, 1, 0)
    late, early = slice(num_chunks - span - 1, num_chunks - 1), slice(span // 2, span // 2 + span)
    print(f"\n{num_chunks} chunks: chunks {early.start} to {early.stop - 1}, and {late.start} to {late.stop - 1}")
    print(f"{'':24}{'early s':>9}{'late s':>9}{'cache MiB':>11}{'late MiB':>10}   late to early")
    for name, seconds in results.items():
        spans = [seconds.of(bench.device)[each] for each in (early, late)]
        medians = "".join(f"{statistics.median(each):9.4f}" for each in spans)
        held = f"{memory[name][early.stop - 1]:11.2f}{memory[name][late.stop - 1]:10.2f}"
        print(f"{name:24}{medians}{held}   {shown(ratio(*reversed(spans)))}", flush=True)


def batch(bench: Bench) -> None:
    """Several videos in a batch."""
    num_chunks = bench.chunks or 9
    contestants = {f"batch {size}": bench.contestant(num_chunks, batch=size) for size in (1, 2, 4)}
    bench.run("batches", contestants, num_chunks, 3, ["batch 1"])


def keys(bench: Bench) -> None:
    """A part of the past evicted: the same grid tokens of all latent frames."""
    first, num_chunks = bench.full_window()
    order = torch.randperm(bench.size.grid[0] * bench.size.grid[1], generator=torch.Generator().manual_seed(0))

    def evict(stream, fraction):
        stream.run.backbone.evict({0: order[: round(fraction * len(order))].tolist()})

    contestants = {
        f"{fraction:.0%} of the past evicted": bench.contestant(num_chunks, between=partial(evict, fraction=fraction))
        for fraction in (0.0, 0.1, 0.2, 0.4)
    }
    bench.run(f"window {bench.windows[-1]}", contestants, num_chunks, first, [next(iter(contestants))])


def compiled(bench: Bench) -> None:
    """Blocks compiled by Inductor, with all graphs made before the measured chunks."""
    first, num_chunks = bench.full_window()
    model = shared(bench.transformer)
    model.compile_repeated_blocks(fullgraph=True)
    contestants = {"eager": bench.contestant(num_chunks), "compiled": bench.contestant(num_chunks, transformer=model)}
    bench.run(f"window {bench.windows[-1]}", contestants, num_chunks, first, ["eager"])


def far(bench: Bench) -> None:
    """AnyFlow-FAR against upstream; see `research.benchmarks.far_rollout` for more."""
    transformer, num_frames = far_rollout.random_model(4, 4, bench.device), 81
    results = far_rollout.compare(transformer, num_frames, (16, 16), bench.repeats, bench.device)
    upstream = [finished[-1] for finished in results["upstream"]["finished"]]
    print(f"\nAnyFlow-FAR, {num_frames} frames, {bench.repeats} repetitions")
    print(f"{'':24}{'clock s':>9}")
    for name, result in results.items():
        seconds = [finished[-1] for finished in result["finished"]]
        against = "" if name == "upstream" else f"   to upstream: {shown(ratio(seconds, upstream))}"
        print(f"{name:24}{result['seconds']:9.3f}{against}", flush=True)


def decoding(bench: Bench) -> None:
    """Latents only, against frames decoded after each chunk; nothing overlaps."""
    num_chunks = bench.chunks or 6
    contestants = {
        "latents": bench.contestant(num_chunks),
        "frames": bench.contestant(num_chunks, vae=small_vae().to(bench.device), output_type="pt"),
    }
    bench.run("decoding by a VAE of base_dim 16", contestants, num_chunks, 2, ["latents"])


TABLES = {each.__name__: each for each in (floor, gate, plus, layouts, long, batch, keys, compiled, far, decoding)}
