# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TriAttention: tokens of the past are kept by what future queries will ask, from rotation alone."""

import os

import torch
from safetensors.torch import load_file

from ..tokentrim_checks import check, check_bool, check_int
from .deep_sink import CompressedSink
from .memory import Memory
from .rope import ROPE_THETA


OFFSETS = [2**power for power in range(8)]  # latent frames into the future
STATISTICS = ("q_mean_real", "q_mean_imag", "q_abs_mean")


class TriAttention(CompressedSink):
    """TriAttention on LongLive (WeianMao/triattention): after a chunk, each layer and head keeps, of its tokens between a
    sink and the recent frames, those that queries of its kind will attend to most. With the published budget of 6, there
    are none between them.

    Args:
        window_size (`int`), num_sink_frames (`int`): as in [`WindowLayout`].
        num_recent_frames (`int`): last frames before a chunk that stay whole.
        budget (`int`): size of the context after a compression, in latent frames' worth of tokens.
        compress_every (`int`): latent frames from one compression to the next, at least.
        per_layer (`bool`): whether layers choose by themselves; otherwise by the mean of their scores.
        statistics (`str`, *optional*): safetensors file of query statistics, as `tokentrim heads` writes it, with
            `q_mean_real`, `q_mean_imag` and `q_abs_mean`, (layers, heads, head_dim / 2); by default those of the run.
    """

    moves_sink = False

    def __init__(
        self,
        window_size: int = 12,
        num_sink_frames: int = 3,
        num_recent_frames: int = 3,
        budget: int = 9,
        compress_every: int = 3,
        per_layer: bool = True,
        statistics: str | os.PathLike | None = None,
    ):
        check_int("compress_every", compress_every, 1)
        check_bool("per_layer", per_layer)
        super().__init__(window_size, num_sink_frames, budget, num_recent_frames)
        self.compress_every = compress_every
        self.statistics = None if statistics is None else read_statistics(statistics)
        chooses = self.num_kept > num_sink_frames
        self.survey = self.scores if chooses and not per_layer else None
        self.before_chunk = self.compress if chooses else None
        self.before_commit = note_queries if chooses and statistics is None else None

    def compressed_at(self, new: list[int]) -> int | None:
        first = max(self.compress_every, self.budget + 1)
        first += (new[0] - first) % len(new)  # the first chunk that starts there or later
        period = -(-self.compress_every // len(new)) * len(new)
        return None if new[0] < first else new[0] - (new[0] - first) % period

    def oldest(self, new: list[int]) -> int:
        start = self.compressed_at(new)
        return 0 if start is None else start - self.num_recent_frames

    def scores(self, memory: Memory, new: list[int]) -> torch.Tensor:
        """How much future queries will attend to each token between sink and recent frames, (tokens, heads)."""
        if self.compressed_at(new) != new[0]:
            return memory.key.new_zeros(0)
        index, time, place = memory.between(self.num_sink_frames, new[0] - self.num_recent_frames)
        slot = memory.held.flatten().cumsum(0).view(memory.held.shape)[index]
        num_tokens, missing = len(memory.places), memory.held.sum() - slot + 1
        assumed = (new[0] * num_tokens - missing).cpu()  # as if the newest tokens were there, without gaps
        moved = time - assumed // num_tokens, place - memory.places[assumed % num_tokens]
        key = memory.rotated(memory.key[index], *moved)
        return future_attention(query_statistics(self.statistics, memory), key, new[0] - assumed // num_tokens, memory)

    def compress(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """The tokens of the highest scores take the places behind the sink, in order, with their time and grid position."""
        if self.compressed_at(new) != new[0]:
            return
        scores = torch.stack(list(memory.surveys)).mean(dim=0) if memory.surveys else self.scores(memory, new)
        index, time, place = memory.between(self.num_sink_frames, new[0] - self.num_recent_frames)
        num_kept = int((time < self.num_kept).sum())
        kept = scores.topk(num_kept, dim=0).indices.sort(dim=0).values[..., None]  # (kept, heads, 1)
        key, value = memory.rotated(memory.key[index], time, place), memory.value[index]
        key, value = (each.gather(0, kept.expand(-1, -1, each.shape[-1])) for each in (key, value))
        target = tuple(each[:num_kept] for each in index)
        memory.key[target] = memory.rotated(key, -time[:num_kept], -place[:num_kept]).to(memory.key.dtype)
        memory.value[target] = value

    def check(self, longest: int, carried: str) -> None:
        least = self.num_sink_frames + self.num_recent_frames
        check(self.budget >= least, "budget", self.budget, f">= {least}: sink and recent frames")
        least = self.budget + -(-self.compress_every // longest) * longest
        check(self.window_size >= least, "window_size", self.window_size, f">= {least}: the budget and {carried} more")

    def check_model(self, num_layers: int, num_heads: int, head_dim: int) -> None:
        shape = num_layers, num_heads, head_dim // 2
        for each in self.statistics or ():
            check(each.shape == shape, "statistics", tuple(each.shape), f"of shape {shape}, for this transformer")


def complex_pairs(hidden_states: torch.Tensor) -> torch.Tensor:
    """(..., head_dim) -> (..., head_dim / 2), as the rotary embedding pairs channels."""
    return torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)).contiguous())


def future_attention(
    statistics: tuple[torch.Tensor, torch.Tensor], key: torch.Tensor, ahead: torch.Tensor, memory: Memory
) -> torch.Tensor:
    """mean over d of sum abs(q) abs(k) cos(w (e - t + d) + arg(q conj k)) + sum (q_abs - abs(q)) abs(k), normalized over
    tokens, (tokens, heads).

    Args:
        statistics (`tuple`): q and q_abs, the means of the queries and of their absolute values, (heads, head_dim / 2).
        key (`torch.Tensor`): keys k, not rotated, (tokens, heads, head_dim).
        ahead (`torch.Tensor`): e - t, latent frames from each token to the next chunk.
        memory ([`Memory`]): its rotary dimensions.
    """
    (q, q_abs), k, dim = statistics, complex_pairs(key), memory.rope_dims[0]
    w = torch.zeros(k.shape[-1], dtype=torch.float64)  # rows and columns do not move
    w[: dim // 2] = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (w * (ahead[:, None, None] + torch.tensor(OFFSETS)[:, None])).float().to(k.device)
    agreement = (angle[:, :, None] + (q * k.conj()).angle()[:, None]).cos().mean(dim=1)
    scores = ((q.abs() * agreement + q_abs - q.abs()) * k.abs()).sum(dim=-1)
    return (scores - scores.mean(dim=0)) / scores.std(dim=0, correction=0).clamp_min(1e-6)


def note_queries(memory: Memory, new: list[int], query: torch.Tensor) -> None:
    """A hook: note the sums of q, of abs(q), and their number, (4, heads, head_dim / 2)."""
    q = complex_pairs(query)
    sums = torch.stack([q.real, q.imag, q.abs(), torch.ones_like(q.real)]).sum(dim=1)
    memory.note = sums if memory.note is None else memory.note + sums


def query_statistics(known: list[torch.Tensor] | None, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the queries of a layer and of their absolute values: known ones, or those that were noted."""
    if known is not None:
        real, imag, q_abs = (each[memory.layer].to(memory.key.device) for each in known)
    elif memory.note is not None:
        real, imag, q_abs = memory.note[:3] / memory.note[3:]
    else:  # no query was seen: keys count by their size
        real, imag, q_abs = torch.tensor([0.0, 0.0, 1.0], device=memory.key.device)
    return torch.complex(real, imag), q_abs


def read_statistics(path: str | os.PathLike) -> list[torch.Tensor]:
    """
    Query statistics of a file, each (layers, heads, head_dim / 2), in fp32.

    Raises:
        `ValueError`: the file does not have them.
    """
    try:
        tensors = load_file(path)
        return [tensors[name].float() for name in STATISTICS]
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        valid = f"a safetensors file with {', '.join(STATISTICS)}, which `tokentrim heads` writes"
        raise ValueError(f"`statistics` must be {valid}, but is {str(path)!r}: {error!r}") from error
