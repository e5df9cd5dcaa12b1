# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Runs the hooks of a layout on the layers of a cache, each when it is due."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..tokentrim_views.layout import Layout
from ..tokentrim_views.rope import RotaryGrid
from .book import TokenBook
from .reading import book_angles
from .rewriting import Rewriter
from .store import LayerStore


@dataclass(frozen=True)
class LayoutHooks:
    """The hooks of a layout in a pass.

    Args:
        layout ([`Layout`]): the layout.
        book ([`TokenBook`]), frames (`list[int]`): tokens of the past, and its latent frames.
        new (`list[int]`): latent frames of the pass.
        rope ([`RotaryGrid`]): of the tokens.
        surveys (`list`): by row and layer, what `survey` returned; filled once in a chunk.
    """

    layout: Layout
    book: TokenBook
    frames: list[int]
    new: list[int]
    rope: RotaryGrid
    surveys: list[list[torch.Tensor]]

    def run(self, layer: LayerStore, layers: Sequence[LayerStore], query: torch.Tensor, is_writing: bool) -> bool:
        """Let the layout rewrite what a layer holds before the first pass of a chunk, and before its commit, read it;
        returns whether a hook has run."""
        layout, ran = self.layout, False
        if layout.survey is not None and not layer.is_begun and not self.surveys:
            of_layers = [self._survey(each, layout.survey) for each in layers if each.key is not None]
            self.surveys.extend(list(row) for row in zip(*of_layers))
        due = [None if layer.is_begun else layout.before_chunk, layout.before_commit if is_writing else None]
        layer.is_begun = True
        for hook in due if layer.key is not None else ():
            if hook is not None:
                past, ran = layer.context(), True
                self._rewriter(layer).rewrite(hook, past, query)
                layer.put(past)
        return ran

    def _survey(self, layer: LayerStore, hook: Callable) -> list[torch.Tensor]:
        return self._rewriter(layer).survey(hook, layer.context())

    def _rewriter(self, layer: LayerStore) -> Rewriter:
        angles = book_angles(self.book, layer.num_rows, self.rope, layer.key.device)
        return Rewriter(self.book, self.frames, self.new, self.rope, angles, self.surveys)
