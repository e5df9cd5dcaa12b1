# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What layouts are told and what they answer: passes, views, and the history of a run."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from ..tokentrim_checks import check


@dataclass(frozen=True)
class Pass:
    """A forward of the transformer: one of the denoising steps of a chunk, or the commit that writes it.

    Args:
        kind (`str`): `"denoise"`, `"commit"`, `"recache"`: the window is encoded again under another prompt, or
            `"self"`: a chunk of the past is encoded again, alone, before a commit.
        step (`int`): index of the denoising step; of the first chunk, where several are in flight.
        is_cut (`bool`): whether the chunk follows a cut, so that its positions are far from those of the past.
        chunk_sizes (`tuple[int, ...]`): latent frames of each chunk of a pass in which chunks read themselves and those
            before them; empty where every frame reads all others.
    """

    kind: str = "denoise"
    step: int = 0
    is_cut: bool = False
    chunk_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class View:
    """What a pass reads of the past, and the temporal positions of all frames in the rotary embedding.

    Where the queries of a pass or the heads of a layer read different frames, a layout returns a list of views, which
    together have every query and every head once.

    Args:
        frames (`Sequence[int]`): latent frames of the past that are read, in the order in which attention sees them; a
            frame may be read twice, at two positions. An entry may also be a list of frames, one for each video.
        positions (`Sequence[int]`): of each of these frames.
        own_positions (`Sequence[int]`): of the keys of each frame that the pass carries.
        query_positions (`Sequence[int]`, *optional*): of its queries; by default those of its keys.
        log_weights (`Sequence[float]`, *optional*): added to the attention scores of each frame of the past.
        strides (`Sequence[int]`, *optional*): of each frame of the past, only every n-th row and column is read.
        queries (`Sequence[int]`, *optional*): frames of the pass whose queries read this view; by default all.
        heads (`Sequence[Sequence[int]]`, *optional*): for each layer, the heads that read this view; by default all.
    """

    frames: Sequence[int | Sequence[int]]
    positions: Sequence[int]
    own_positions: Sequence[int]
    query_positions: Sequence[int] | None = None
    log_weights: Sequence[float] | None = None
    strides: Sequence[int] | None = None
    queries: Sequence[int] | None = None
    heads: Sequence[Sequence[int]] | None = None


@dataclass
class RunHistory:
    """What has happened in a run, as far as layouts may need it; saved with the run.

    Args:
        shots (`list[int]`): first latent frame of each shot but the first.
        notes (`dict[int, torch.Tensor]`): what the layout's `committed` returned for each held frame, (B, ...).
    """

    shots: list[int] = field(default_factory=list)
    notes: Mapping[int, torch.Tensor] = field(default_factory=dict)


def check_frames(verb: str, frames: Any, layout: Any) -> list[int]:
    """The frames that a verb of a layout returned, as a list; raises if they are no numbers of latent frames."""
    is_list = isinstance(frames, Iterable) and not isinstance(frames, (str, dict))
    frames = list(frames) if is_list else frames
    whole = is_list and all(isinstance(frame, Integral) and not isinstance(frame, bool) for frame in frames)
    check(
        whole, f"{type(layout).__name__}.{verb}", frames, "a list of latent frames, numbers of those held", TypeError
    )
    return frames


def check_views(views: Any, layout: Any, held: Sequence[int], new: Sequence[int], num_videos: int) -> None:
    """Refuse views that do not fit the frames in memory and those of the pass, or do not serve all its queries."""
    for view in views:
        _check_view(view, layout, held, new, num_videos)
    if len(views) == 1 and views[0].queries is None and views[0].heads is None:
        return
    readers: Counter = Counter()
    for view in views:
        queries = new if view.queries is None else view.queries
        by_layer = [[None]] if view.heads is None else view.heads
        readers.update((q, layer, head) for q in queries for layer, heads in enumerate(by_layer) for head in heads)
    heads = {(layer, head) for _, layer, head in readers}
    whole = set(readers) == {(query, *head) for query in new for head in heads} and max(readers.values()) == 1
    valid = "views that together have every query and every head once"
    check(whole, f"{type(layout).__name__}.view", [(view.queries, view.heads) for view in views], valid)


def _check_view(view: Any, layout: Any, held: Sequence[int], new: Sequence[int], num_videos: int) -> None:
    name = f"{type(layout).__name__}.view"
    valid = f"a View for the latent frames {new[0]} to {new[-1]}: frames of {list(held)}, a position for each"
    fits = all(hasattr(view, field) for field in View.__dataclass_fields__)
    check(fits, name, view, valid, TypeError)
    entries = [entry if isinstance(entry, (list, tuple)) else [entry] * num_videos for entry in view.frames]
    known = all(len(entry) == num_videos and set(entry) <= set(held) for entry in entries)
    own = (view.own_positions, view.own_positions if view.query_positions is None else view.query_positions)
    of_frames = [view.positions if each is None else each for each in (view.log_weights, view.strides)]
    lengths = all(len(each) == len(view.frames) for each in (view.positions, *of_frames))
    check(known and lengths and all(len(each) == len(new) for each in own), name, view, valid)
