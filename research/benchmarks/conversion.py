# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Memory and seconds of a conversion of 2 GB in eight files, and of `--check` of 10 GB; the originals are sparse files.

python -m research.benchmarks.conversion
"""

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path

from tokentrim.tools.original import list_shapes


WORLD = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny-world"  # tokenizer, text encoder and VAE
SIZE = {"num_attention_heads": 48, "attention_head_dim": 32, "ffn_dim": 8960, "freq_dim": 256, "patch_size": (1, 2, 2)}
LATENTS = {"text_dim": 64, "in_channels": 4, "out_channels": 4}
NUM_FILES = 8


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], code: str = "F32", size: int = 4) -> None:
    """A complete safetensors file of zeros that occupies no space on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]], num_files: int) -> Path:
    """The same, split into several files; returns their index."""
    names, weight_map = list(shapes), {}
    folder.mkdir()
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        write_sparse(folder / file, {name: shapes[name] for name in names[number::num_files]})
        weight_map |= dict.fromkeys(names[number::num_files], file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def run(*command: str) -> tuple[str, float, float]:
    """Output and seconds of a Python command, and the largest memory of all commands so far, in MB."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(process.stderr)
    return process.stdout, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11, help="blocks of the converted model (default: 11, 2.1 GB)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        big = folder / "big.safetensors"
        write_sparse(big, list_shapes({**SIZE, **LATENTS, "num_layers": 54}))
        _, seconds, _ = run("-m", "tokentrim", "convert", str(big), "--check", "--base", str(WORLD))
        print(f"--check     {big.stat().st_size / 1e9:5.1f} GB  {seconds:6.1f} s", flush=True)
        _, seconds, memory = run("-c", "import tokentrim.tools.convert")
        print(f"imports                {seconds:6.1f} s  {memory:5.0f} MB of memory", flush=True)
        index = write_shards(
            folder / "shards", list_shapes({**SIZE, **LATENTS, "num_layers": options.layers}), NUM_FILES
        )
        size = sum(path.stat().st_size for path in index.parent.glob("*.safetensors"))
        arguments = ["--preset", "self_forcing", "--base", str(WORLD), "--out", str(folder / "out")]
        _, seconds, memory = run("-m", "tokentrim", "convert", str(index), *arguments)
        print(f"conversion  {size / 1e9:5.1f} GB  {seconds:6.1f} s  {memory:5.0f} MB of memory")


if __name__ == "__main__":
    main()
