# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measured seconds, and ratios with intervals."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


FEWEST = 6  # pairs: fewer lie on one side of the median with more than 5% probability


@dataclass
class Seconds:
    """Seconds of each measured chunk, in order: of the CPU, and of the clock."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def of(self, device: str) -> list[float]:
        """The seconds for ratios: the clock's on a GPU."""
        return self.cpu if device == "cpu" else self.wall

    def summed(self, num_chunks: int) -> "Seconds":
        """Sums over groups of this many chunks."""
        starts = range(0, len(self.cpu) - num_chunks + 1, num_chunks)
        return Seconds(
            *([sum(each[start : start + num_chunks]) for start in starts] for each in (self.cpu, self.wall))
        )


def take_turns(contestants: dict[str, Callable], repeats: int, first: int) -> dict[str, Seconds]:
    """Run all contestants `repeats` times, chunk by chunk in turn; measure the chunks from `first` on."""
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


def ratio(times: list[float], to: list[float]) -> tuple[float, float, float] | None:
    """Median of paired ratios and its 95% interval; `None` for too few pairs."""
    if len(times) < FEWEST:
        return None
    ratios = sorted(ours / theirs for ours, theirs in zip(times, to))
    low = max(int((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2), 0)
    return statistics.median(ratios), ratios[low], ratios[-1 - low]


def shown(measured: tuple[float, float, float] | None) -> str:
    """A ratio with its interval; the interval alone if it contains 1."""
    if measured is None:
        return f"(fewer than {FEWEST} pairs)"
    median, low, high = measured
    return f"[{low:.3f}, {high:.3f}]" if low <= 1 <= high else f"{median:.3f} [{low:.3f}, {high:.3f}]"


def machine(device: str) -> str:
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s)"
    else:
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


def table(results: dict[str, Seconds], device: str, references: Sequence[str]) -> str:
    """Print the seconds of a chunk, and the ratios to the `references` above it."""
    width = max(24, 2 + max(map(len, results)))
    lines, names = [f"{'':{width}}{'CPU s':>9}{'clock s':>9}"], list(results)
    for place, (name, seconds) in enumerate(results.items()):
        line = f"{name:{width}}{statistics.median(seconds.cpu):9.3f}{statistics.median(seconds.wall):9.3f}"
        for other in (each for each in names[:place] if each in references):
            line += f"   to {other}: " + shown(ratio(seconds.of(device), results[other].of(device)))
        lines.append(line)
    return "\n".join(lines)
