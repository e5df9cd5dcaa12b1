# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Layouts in which heads read different frames: one layout for each kind of head, and Pyramid Forcing."""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..tokentrim_checks import check, check_int, check_list
from .layout import Layout
from .memory import Memory
from .view import Pass, View


Labels = list[list[int]]


class ByHead(Layout):
    """Gives each head of each layer one of several layouts. Frames stay in memory as long as one of them keeps them.

    Args:
        labels (`list[list[int]]` or `str`): for each layer and head, the index of its layout; or a JSON file that has this
            list, or has it under `"labels"`, as `tokentrim heads` writes it.
        layouts (`list[Layout]`): the layouts; none may rewrite keys.
    """

    one_chunk_a_pass = True
    for_heads = False
    by_head = True
    transitions = ("keep",)  # the others would mix what the layouts keep

    def __init__(self, labels: Labels | str | os.PathLike, layouts: Sequence[Layout]):
        self.labels = read_labels(labels, range(len(layouts)))
        self.layouts = list(layouts)
        for layout in layouts:
            fits = layout.for_heads and not any((layout.survey, layout.before_chunk, layout.before_commit))
            check(fits, "layouts", type(layout).__name__, "layouts that only choose frames, positions and weights")
        self.num_sink_frames = max(layout.num_sink_frames for layout in layouts)
        sizes = [layout.window_size for layout in layouts]
        self.window_size = None if None in sizes else max(sizes)

    def heads(self, index: int) -> list[list[int]]:
        """The heads of a layout, by layer."""
        return [[head for head, label in enumerate(layer) if label == index] for layer in self.labels]

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        kept = {frame for layout in self.layouts for frame in layout.keep(list(held), list(new))}
        return [frame for frame in held if frame in kept]

    def sink(self, held: list[int]) -> list[int]:
        sink = {frame for layout in self.layouts for frame in layout.sink(list(held))}
        return [frame for frame in held if frame in sink]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> list[View]:
        views = []
        for index, layout in enumerate(self.layouts):
            of_layout = layout.view(layout.keep(list(held), list(new)), list(new), pass_)
            heads = self.heads(index)
            if any(heads):
                of_layout = of_layout if isinstance(of_layout, list) else [of_layout]
                views += [replace(view, heads=heads) for view in of_layout]
        return views

    def sized(self, longest: int) -> "ByHead":
        sized = copy.copy(self)
        sized.layouts = [layout.sized(longest) for layout in self.layouts]
        return sized

    def check(self, longest: int, carried: str) -> None:
        for layout in self.layouts:
            layout.check(longest, carried)

    def check_model(self, num_layers: int, num_heads: int, head_dim: int) -> None:
        shape = [len(layer) for layer in self.labels]
        valid = f"one for each of {num_layers} layers and {num_heads} heads"
        check(shape == [num_heads] * num_layers, "labels", shape, valid)


def read_labels(labels: Labels | str | os.PathLike, known: Sequence[int]) -> Labels:
    """
    Labels of heads, from lists or a file.

    Raises:
        `TypeError`, `ValueError`: they are not lists of known labels, one list for each layer.
    """
    if isinstance(labels, (str, os.PathLike)):
        try:
            labels = json.loads(Path(labels).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"`labels` must be a JSON file of labels, but is {str(labels)!r}: {error}") from error
        labels = labels.get("labels") if isinstance(labels, dict) else labels
    valid = f"lists of {list(known)}, one for each layer, or a file of `tokentrim heads`"
    check_list("labels", labels, (list, tuple), valid)
    for layer in labels:
        check_list("labels", layer, int, valid)
        check(len(layer) > 0 and set(layer) <= set(known), "labels", layer, valid)
    check(len(labels) > 0, "labels", labels, valid)
    return [list(layer) for layer in labels]


WAVE, ANCHOR, VEIL = range(3)  # kinds of heads, as `tokentrim heads` labels them; the source's -1 is also a wave
SINK_TIME = 21  # latent frame up to which a sink stands at 0; later it follows
BLOCK, PATCH = 4, 2  # frames, and rows and columns, that a veil head merges into one token


class PyramidHead(Layout):
    """What one kind of head reads in Pyramid Forcing, for each frame of queries: a sink, the newest frames, and a middle.

    Args:
        kind (`int`): `WAVE`: the middle has frames of the query's phase of a period. `ANCHOR`: every n-th frame; it also
            reads the first frame after the sink. `VEIL`: blocks of frames, each merged into tokens of its first frame.
        num_recent_frames (`int`): newest frames without the sink, the whole chunk included.
        every (`int`): distance of the frames of the middle.
        num_middle (`int`): how many of them there are at most.
    """

    def __init__(self, kind: int, num_recent_frames: int, every: int, num_middle: int):
        self.kind, self.num_recent_frames, self.every, self.num_middle = kind, num_recent_frames, every, num_middle
        self.num_sink_frames = 1 if kind == WAVE else 3
        self.size, self.stride = (BLOCK, PATCH) if kind == VEIL else (1, 1)
        self.window_size = self.num_sink_frames + 1 + num_middle + num_recent_frames

    def keep(self, held: list[int], new: list[int]) -> list[int]:
        oldest = new[0] - max(self.every * self.num_middle, self.num_recent_frames) - 2 * (self.size - 1)
        return [frame for frame in held if frame <= self.num_sink_frames or frame >= oldest]

    def middle(self, query: int, end: int) -> list[int]:
        """First frames of the entries that a query frame reads, of the newest ones among the frames before `end`."""
        phase = query % self.every if self.kind == WAVE else 0
        stored = range(phase or self.every, end + 1 - self.size, self.every)[-self.num_middle :]
        return [first for first in stored if first + self.size <= query + 1 - self.num_recent_frames]

    def view(self, held: list[int], new: list[int], pass_: Pass) -> list[View]:
        size, views = self.num_sink_frames, []
        oldest = max(new[-1] + 1 - self.num_recent_frames, size)
        start = [frame for frame in held if frame < size]
        whole = [frame for frame in held if frame >= oldest or (self.kind == ANCHOR and frame == size)]
        for query in new:
            sink = max(query - SINK_TIME, 0)
            middle = self.middle(query, new[-1] + 1 if pass_.kind == "commit" else new[0])
            places = [first + 1 if self.kind == VEIL else sink for first in middle]
            own = [sink if frame < size else frame for frame in new]
            strides = [1] * len(start + whole) + [self.stride] * len(middle)
            positions = [sink] * len(start) + whole + places
            views.append(View(start + whole + middle, positions, own, new, strides=strides, queries=[query]))
        return views


class Pyramid(ByHead):
    """Pyramid Forcing (IF-LAB-PKU/Pyramid-Forcing): wave heads read frames of one phase of a period, anchor heads every
    n-th frame, veil heads blocks of four frames merged in patches of 2 x 2.

    Args:
        labels (`list[list[int]]` or `str`): as in [`ByHead`]: 0 or -1 for wave, 1 for anchor, 2 for veil.
        num_recent_frames (`int`): newest frames that every head reads, the current chunk included.
        period (`int`), num_cyclic (`int`): of wave heads, and the frames of a phase that they read.
        interval (`int`), num_strided (`int`): distance of the frames of anchor heads, and their number.
        num_merged (`int`): blocks that veil heads read.
    """

    def __init__(
        self,
        labels: Labels | str | None = None,
        num_recent_frames: int = 4,
        period: int = 6,
        num_cyclic: int = 4,
        interval: int = 6,
        num_strided: int = 4,
        num_merged: int = 4,
    ):
        sizes = {"num_recent_frames": num_recent_frames, "period": period, "num_cyclic": num_cyclic}
        sizes |= {"interval": interval, "num_strided": num_strided, "num_merged": num_merged}
        for name, size in sizes.items():
            check_int(name, size, 1)
        middles = (WAVE, period, num_cyclic), (ANCHOR, interval, num_strided), (VEIL, BLOCK, num_merged)
        kinds = [PyramidHead(kind, num_recent_frames, *middle) for kind, *middle in middles]
        labels = read_labels(labels, (-1, WAVE, ANCHOR, VEIL))
        super().__init__([[max(label, WAVE) for label in layer] for layer in labels], kinds)
        self.num_recent_frames = num_recent_frames
        if not any(self.heads(VEIL)):
            self.before_chunk = None

    def before_chunk(self, memory: Memory, new: list[int], query: torch.Tensor) -> None:
        """The tokens of a block are merged once no query reads them as recent frames."""
        last, tag = new[-1] + 1 - self.num_recent_frames - BLOCK, memory.tag.clone()
        heads = torch.tensor(self.heads(VEIL)[memory.layer], dtype=torch.long, device=memory.key.device)
        for first in (frame for frame in memory.frames if frame % BLOCK == 0 and 0 < frame <= last):
            places = [memory.frames.index(frame) for frame in range(first, first + BLOCK) if frame in memory.frames]
            if len(places) == BLOCK and len(heads) and not tag[places[0]].any():
                merge(memory, places, heads)
                tag[places[0], :, 0] = 1
        memory.tag = tag

    def check(self, longest: int, carried: str) -> None:
        check(
            self.num_recent_frames >= longest, "num_recent_frames", self.num_recent_frames, f">= {longest}: {carried}"
        )


def merge(memory: Memory, places: list[int], heads: torch.Tensor) -> None:
    """The mean of keys and values of some heads over frames and patches takes the place of each patch's first token in the
    first frame."""
    _, patch = (memory.places // PATCH).unique(dim=0, return_inverse=True)
    first = (memory.places % PATCH == 0).all(dim=-1).nonzero()[:, 0].to(memory.key.device)
    patch, held = patch.to(memory.key.device).repeat(len(places)), memory.held[places].flatten()
    count = torch.zeros(len(first), device=held.device).index_add(0, patch, held.float())
    for table in (memory.key, memory.value):
        tokens = table[places][:, :, heads].flatten(0, 1).float() * held[:, None, None]
        total = tokens.new_zeros(len(first), *tokens.shape[1:]).index_add(0, patch, tokens)
        mean = (total / count.clamp_min(1)[:, None, None])[count > 0].to(table.dtype)
        table[places[0], first[count > 0][:, None], heads] = mean
