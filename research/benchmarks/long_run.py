# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A stream of the tiny world with `tokentrim_plus`: resident memory and seconds of every chunk.

python -m research.benchmarks.long_run --chunks 2000

Seconds cover the whole chunk, with `--decode` also its decoding. CPU seconds count this process only, but they grow if
other work shares caches and cores.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from research.evaluation.rollouts import load_pipeline
from tokentrim.tokentrim_session.progress import resident_bytes


EARLY, FIRST = slice(50, 150), 100  # chunks whose seconds are compared, and the chunk whose memory is compared


def measure(pipe, prompt: str, seed: int, num_chunks: int, decode: bool, log: Path) -> list[dict]:
    """Memory and seconds by chunk. Each line also goes to `log`, so that an interrupted run is not lost."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    output_type, start, cpu_start = "np" if decode else "latent", time.perf_counter(), time.process_time()
    with (
        log.open("w") as file,
        pipe.stream(prompt, method="tokentrim_plus", generator=generator, output_type=output_type) as stream,
    ):
        for chunk in stream:
            if not torch.isfinite(chunk.latents).all():
                raise RuntimeError(f"Chunk {chunk.index} is not finite.")
            now, cpu = time.perf_counter(), time.process_time()
            row = {"chunk": chunk.index, "seconds": now - start, "cpu": cpu - cpu_start, "bytes": resident_bytes()}
            row["quarantined"], start, cpu_start = chunk.decisions[0]["quarantined"], now, cpu
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            if len(rows) == num_chunks:
                return rows
    return rows


def summary(rows: list[dict]) -> str:
    seconds, memory = np.array([row["seconds"] for row in rows]), np.array([row["bytes"] for row in rows]) / 2**20
    first = min(FIRST, len(rows) - 1)
    lines = [
        f"{len(rows)} chunks in {seconds.sum() / 60:.1f} minutes, {sum(row['quarantined'] for row in rows)} quarantined",
        f"first chunk after {seconds[0]:.2f} s",
        f"resident memory: {memory[first]:.1f} MiB after chunk {first}, {memory[-1]:.1f} MiB after chunk "
        f"{len(rows) - 1} ({memory[-1] / memory[first] - 1:+.1%}), at most {memory.max():.1f} MiB",
    ]
    if len(rows) >= EARLY.stop + 100:
        lines.append(f"chunks {EARLY.start} to {EARLY.stop - 1}, and the last 100:")
        for name in ("seconds", "cpu"):
            values = np.array([row[name] for row in rows])
            for what, share in (("median", 0.5), ("lowest tenth", 0.1)):
                begin, end = np.quantile(values[EARLY], share), np.quantile(values[-100:], share)
                lines.append(f"  {name} per chunk, {what}: {begin:.3f} and {end:.3f} ({end / begin - 1:+.1%})")
    return "\n".join(lines)


def plot(rows: list[dict]):
    """Resident memory, and seconds per chunk with their running median, over the chunks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    chunks, seconds = [row["chunk"] for row in rows], np.array([row["seconds"] for row in rows])
    top.plot(chunks, [row["bytes"] / 2**20 for row in rows], color="tab:blue")
    top.set(ylabel="resident memory\nMiB", ylim=(0, None))
    half = 25
    medians = [np.median(seconds[max(at - half, 0) : at + half + 1]) for at in range(len(seconds))]
    bottom.plot(chunks, seconds, ".", markersize=2, color="0.7", label="a chunk")
    bottom.plot(chunks, medians, color="tab:blue", label=f"median of {2 * half + 1}")
    bottom.set(xlabel="chunk", ylabel="seconds per chunk", ylim=(0, 3 * np.median(seconds)))
    bottom.legend(frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--prompt", default="a red circle moving right over a blue background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode", action="store_true", help="decode the frames")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/long_run"))
    parser.add_argument("--read", action="store_true", help="report an interrupted run from --out, without new chunks")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "chunks.jsonl"
    if args.read:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    else:
        torch.set_num_threads(args.threads)
        pipe = load_pipeline()
        pipe.set_progress_bar_config(disable=True)
        rows = measure(pipe, args.prompt, args.seed, args.chunks, args.decode, log)
    print(summary(rows))
    plot(rows).savefig(args.out / "long_run.png", dpi=110)


if __name__ == "__main__":
    main()
