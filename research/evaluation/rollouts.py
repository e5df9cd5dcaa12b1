# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The methods that the demo compares, and one paired run of them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tokentrim import TokenTrimPipeline, TokenTrimPipelineOutput
from tokentrim.tokentrim_kv.cache import RollingKVCache
from tokentrim.tools.worlds import WORLDS


ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "tiny-world"
PROMPTS = {name: world.examples[0] for name, world in WORLDS.items()}  # for each shipped checkpoint
STAYS = {name: world.top for name, world in WORLDS.items()}  # share of the picture, from the top, that should stay
CONFIGS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "configs").glob("*.json")}
WORLD = CONFIGS["tiny_world"]
# Without FlowMo, a trimmed rollout equals the plain one up to the first trigger.
METHODS = ("plain", "tokentrim", "tokentrim_plus")


@dataclass
class Run:
    """Videos of one method, with their decisions and what they cost."""

    output: TokenTrimPipelineOutput
    seconds: float
    denoiser_calls: int

    @property
    def frames(self) -> np.ndarray:
        """(B, frames, H, W, 3) in [0, 1]."""
        return self.output.frames

    @property
    def decisions(self) -> list[list[dict]]:
        return self.output.decisions


def load_pipeline(checkpoint: Path = CHECKPOINT) -> TokenTrimPipeline:
    """A shipped world model."""
    return TokenTrimPipeline.from_pretrained(checkpoint)


@contextmanager
def counted_calls(pipe: TokenTrimPipeline) -> Iterator[list]:
    """A list that grows by one for each transformer call inside the block."""
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def counted_keys() -> Iterator[list[int]]:
    """A list that grows by the number of keys per query, for each pass through each layer inside the block."""
    counts, update = [], RollingKVCache.update

    def counted(*args):
        keys, values, mask = update(*args)
        counts.append(keys.shape[1])
        return keys, values, mask

    with mock.patch.object(RollingKVCache, "update", counted):
        yield counts


def draw_noise(pipe: TokenTrimPipeline, seeds: list[int], num_frames: int) -> torch.Tensor:
    """Initial noise of whole videos, (B, C, T, H, W), drawn at once, as for the published results."""
    size = [pipe.config.height // pipe.vae_scale_factor_spatial, pipe.config.width // pipe.vae_scale_factor_spatial]
    shape = (pipe.transformer.config.in_channels, (num_frames - 1) // pipe.vae_scale_factor_temporal + 1, *size)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def run_method(pipe: TokenTrimPipeline, method: str, prompts: list[str], seeds: list[int], num_chunks: int) -> Run:
    """Generate one video for each prompt and seed; the same seeds give every method the same noise."""
    start = time.perf_counter()
    with counted_calls(pipe) as calls:
        output = pipe(
            prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_frames=num_chunks * pipe.config.num_frames_per_chunk,
            method=method,
        )
    return Run(output, time.perf_counter() - start, len(calls))
