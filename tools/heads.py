# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the heads of a model attend to: labels for layouts by head, and the query statistics of TriAttention."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from ..tokentrim_checks import check
from ..tokentrim_views.heads import ANCHOR, VEIL, WAVE
from ..tokentrim_views.layout import Layout
from ..tokentrim_views.memory import Memory
from ..tokentrim_views.triattention import STATISTICS
from ..tokentrim_writing import write_whole
from .loading import load_checkpoint


KINDS = {WAVE: "wave", ANCHOR: "anchor", VEIL: "veil"}
NUM_SINK, NUM_RECENT = 3, 3  # frames of the past, first and last
NUM_QUERIES = 64  # of a chunk and layer, evenly spaced
PERIODS = range(2, 13)  # latent frames
PERIODIC = 0.3  # autocorrelation of a head's attention over distance, from which it counts as periodic


class Head(NamedTuple):
    """What a head attends to, in shares of its attention to the past.

    Args:
        layer (`int`), head (`int`): which head it is.
        label (`int`): a key of `KINDS`.
        sink (`float`), recent (`float`), middle (`float`): shares of the first frames, the last ones, and those between.
        period (`int`): latent frames after which its attention resembles itself most.
        strength (`float`): the autocorrelation there, at most 1.
    """

    layer: int
    head: int
    label: int
    sink: float
    recent: float
    middle: float
    period: int
    strength: float


class HeadSurvey(Layout):
    """Reads all of the past, and measures in every commit what each head attends to."""

    one_chunk_a_pass = True

    def __init__(self):
        self.shares: dict[int, list[torch.Tensor]] = {}  # by layer: (heads, sink, recent and middle) of each commit
        self.profiles: dict[int, dict[int, list[torch.Tensor]]] = {}  # by layer and distance: (heads,)
        self.sums: dict[
            int, torch.Tensor
        ] = {}  # by layer: of q, of abs(q), and their number, (4, heads, head_dim / 2)

    def before_commit(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        pairs = torch.view_as_complex(query.float().unflatten(-1, (-1, 2)).contiguous())
        sums = torch.stack([pairs.real, pairs.imag, pairs.abs(), torch.ones_like(pairs.real)]).sum(dim=1).cpu()
        self.sums[memory.layer] = self.sums.get(memory.layer, 0) + sums
        mass = frame_mass(memory, new, query).cpu()  # (heads, queries, frames)
        sink = mass[..., :NUM_SINK].sum(dim=-1)
        recent = mass[..., NUM_SINK:][..., -NUM_RECENT:].sum(dim=-1)
        if len(memory.frames) > NUM_SINK + NUM_RECENT:
            shares = torch.stack([sink, recent, 1 - sink - recent], dim=-1).mean(dim=1)
            self.shares.setdefault(memory.layer, []).append(shares)
        for at, frame in enumerate(query_frames(memory, new, query)[1].tolist()):
            for place, past in enumerate(memory.frames[NUM_SINK:], start=NUM_SINK):
                profile = self.profiles.setdefault(memory.layer, {})
                profile.setdefault(frame - past, []).append(mass[:, at, place])


def query_frames(memory: Memory, new: list[int], query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries that are measured, and the latent frame of each."""
    chosen = torch.arange(0, len(query), max(len(query) // NUM_QUERIES, 1))
    return chosen, torch.tensor(new)[chosen // len(memory.places)]


def frame_mass(memory: Memory, new: list[int], query: torch.Tensor) -> torch.Tensor:
    """softmax(q . k / sqrt(d)) over the past, summed over the tokens of a frame, (heads, queries, frames)."""
    chosen, time = query_frames(memory, new, query)
    query = memory.rotated(query[chosen.to(query.device)], time, memory.places[chosen % len(memory.places)])
    time = torch.tensor(memory.frames).repeat_interleave(len(memory.places))
    key = memory.rotated(memory.key.flatten(0, 1), time, memory.places.repeat(len(memory.frames), 1))
    scores = torch.einsum("qhd,khd->hqk", query, key) / key.shape[-1] ** 0.5
    scores = scores.masked_fill(~memory.held.flatten(), -torch.inf)
    return scores.softmax(dim=-1).unflatten(-1, (len(memory.frames), -1)).sum(dim=-1)


def classify(shares: torch.Tensor, profile: Sequence[float]) -> tuple[int, int, float]:
    """
    The label of a head, its period and how strong that is.

    Args:
        shares (`torch.Tensor`): of sink, recent and middle frames, (3,).
        profile (`Sequence[float]`): mean attention by distance, 1, 2, ...
    """
    curve = torch.tensor(profile[NUM_RECENT:]).clamp_min(1e-12).log()
    period, strength = 0, 0.0
    if len(curve) >= 2 * PERIODS[0] + 2:
        time = torch.arange(len(curve), dtype=curve.dtype)
        slope = ((time - time.mean()) * (curve - curve.mean())).sum() / ((time - time.mean()) ** 2).sum()
        rest = curve - curve.mean() - slope * (time - time.mean())  # attention fades with distance anyway
        for lag in PERIODS:
            if 2 * lag <= len(rest):
                pair = rest[:-lag], rest[lag:]
                norm = (pair[0].norm() * pair[1].norm()).clamp_min(1e-12)
                found = ((pair[0] * pair[1]).sum() / norm).item()
                period, strength = (lag, found) if found > strength else (period, strength)
    sink, recent, _ = shares.tolist()
    if strength > PERIODIC and period > PERIODS[0]:
        return WAVE, period, strength
    return (ANCHOR if sink >= recent else VEIL), period, strength


def survey_heads(
    folder: Path, prompt: str, num_chunks: int, dtype: torch.dtype | None = None
) -> tuple[list[Head], dict[str, torch.Tensor]]:
    """
    Run one short rollout of a checkpoint and measure its heads.

    Args:
        folder (`Path`): a checkpoint in Diffusers format, with a Wan transformer.
        prompt (`str`): the prompt.
        num_chunks (`int`): chunks of the rollout.
        dtype (`torch.dtype`, *optional*): of the weights. By default, float32 on a CPU, else bfloat16.

    Returns:
        `tuple`: the heads, and query statistics by name, each (layers, heads, head_dim / 2).

    Raises:
        `ValueError`: the checkpoint cannot run passes of one chunk.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    pipe = load_checkpoint(folder, dtype, vae=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    survey, size = HeadSurvey(), pipe.config.get("num_frames_per_chunk") or 3
    least = (NUM_SINK + NUM_RECENT) // size + 3  # the last chunk is not committed
    check(num_chunks >= least, "--chunks", num_chunks, f">= {least}: a sink, recent frames and some between")
    pipe(
        prompt,
        chunk_partition=[size] * num_chunks,
        num_frames=(size * num_chunks - 1) * pipe.vae_scale_factor_temporal + 1,
        rollout="self_forcing",
        method="plain",
        layout=survey,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    heads = []
    for layer, shares in sorted(survey.shares.items()):
        mean = torch.stack(shares).mean(dim=0)
        profile = [torch.stack(each).mean(dim=0) for _, each in sorted(survey.profiles[layer].items())]
        for head in range(len(mean)):
            label, period, strength = classify(mean[head], [each[head].item() for each in profile])
            heads.append(Head(layer, head, label, *mean[head].tolist(), period, strength))
    sums = torch.stack([each for _, each in sorted(survey.sums.items())])  # (layers, 4, heads, head_dim / 2)
    means = (sums[:, :3] / sums[:, 3:]).unbind(dim=1)
    return heads, {name: each.contiguous() for name, each in zip(STATISTICS, means)}


def format_heads(heads: Sequence[Head]) -> str:
    """A table with a row for each layer, and the sums."""
    rows = ["layer  wave  anchor  veil  sink  recent  middle"]
    layers = sorted({head.layer for head in heads})
    for layer in [*layers, None]:
        of_layer = [head for head in heads if layer in (head.layer, None)]
        kinds = Counter(head.label for head in of_layer)
        means = [
            sum(getattr(head, name) for head in of_layer) / len(of_layer) for name in ("sink", "recent", "middle")
        ]
        name = "all" if layer is None else layer
        rows.append(
            f"{name:>5}  {kinds[WAVE]:4}  {kinds[ANCHOR]:6}  {kinds[VEIL]:4}"
            f"  {means[0]:4.0%}  {means[1]:6.0%}  {means[2]:6.0%}"
        )
    return "\n".join(rows)


def write_labels(path: Path, heads: Sequence[Head]) -> None:
    """The labels, as layouts by head read them, and what they come from."""
    layers: dict[int, list[int]] = {}
    for head in heads:
        layers.setdefault(head.layer, []).append(head.label)
    facts: list[dict[str, Any]] = [{**head._asdict(), "kind": KINDS[head.label]} for head in heads]
    content = {"labels": list(layers.values()), "kinds": {str(label): name for label, name in KINDS.items()}}
    write_whole(path, json.dumps({**content, "heads": facts}, indent=1) + "\n")


def write_statistics(path: Path, statistics: dict[str, torch.Tensor]) -> None:
    """The query statistics, as the layout `triattention` reads them."""
    write_whole(path, save(statistics))
