# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The book of tokens: which latent frame and grid token each column of a cache is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..tokentrim_checks import check, check_saved


def take_tokens(by_token: torch.Tensor, columns: torch.Tensor, heads: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens of (rows, tokens, ...) by `columns`, (rows, taken); of (rows, tokens, heads, head_dim), only some `heads`."""
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return by_token[rows, columns] if heads is None else by_token[rows[..., None], columns[..., None], heads]


@dataclass
class TokenBook:
    """Which (latent frame, grid token) each column of a sequence is, (B, tokens) each.

    Args:
        frame (`torch.Tensor`): latent frames.
        token (`torch.Tensor`): indices among the places of a frame.
        held (`torch.Tensor`): False for padding and for tokens that no query may attend to.
        log_weight (`torch.Tensor`, *optional*): added to the attention scores of each token.
    """

    frame: torch.Tensor
    token: torch.Tensor
    held: torch.Tensor
    log_weight: torch.Tensor | None = None

    @classmethod
    def of_frames(cls, frames: Sequence[int], num_tokens: int, num_videos: int) -> "TokenBook":
        """All `num_tokens` tokens of each of some latent frames, frame-major."""
        frame = torch.tensor(frames, dtype=torch.long).repeat_interleave(num_tokens).expand(num_videos, -1)
        token = torch.arange(num_tokens).repeat(len(frames)).expand(num_videos, -1)
        return cls(frame, token, torch.ones_like(frame, dtype=torch.bool))

    def check(self, num_videos: int, num_places: int, frames: Sequence[int]) -> None:
        """Refuse tables of a saved run that do not fit each other, the grid, or the latent `frames` of its context."""
        check_saved("the frame of each token", self.frame, (num_videos, None), torch.long)
        shape = self.frame.shape
        check_saved("the place of each token", self.token, shape, torch.long)
        check_saved("whether each token is held", self.held, shape, torch.bool)
        if self.log_weight is not None:
            check_saved("the weight of each token", self.log_weight, shape)
        on_grid = bool(((self.token >= 0) & (self.token < num_places)).all())
        in_context = bool(torch.isin(self.frame[self.held], torch.tensor(frames, dtype=torch.long)).all())
        valid = f"of a run of the same call, with tokens of {num_places} places in the frames of its context"
        check(on_grid and in_context, "state", "tokens elsewhere", valid)

    # 1. Other books

    def taken(self, columns: torch.Tensor, held: torch.Tensor) -> "TokenBook":
        """The tokens at `columns`, (B, taken); `held`, (B, tokens), says which of all tokens are held."""
        log_weight = None if self.log_weight is None else self.log_weight.gather(1, columns)
        return TokenBook(*(table.gather(1, columns) for table in (self.frame, self.token, held)), log_weight)

    def of_video(self, video: int) -> "TokenBook":
        """The row of one video."""
        rows = slice(video, video + 1)
        log_weight = None if self.log_weight is None else self.log_weight[rows]
        return TokenBook(self.frame[rows], self.token[rows], self.held[rows], log_weight)

    def since(self, column: int) -> "TokenBook":
        """The tokens from `column` on."""
        log_weight = None if self.log_weight is None else self.log_weight[:, column:]
        return TokenBook(self.frame[:, column:], self.token[:, column:], self.held[:, column:], log_weight)

    def appended(self, other: "TokenBook") -> "TokenBook":
        """The tokens of this book, then those of `other`."""
        pairs = ((self.frame, other.frame), (self.token, other.token), (self.held, other.held))
        log_weight = None
        if self.log_weight is not None or other.log_weight is not None:
            log_weight = torch.cat([self.weights(), other.weights()], dim=1)
        return TokenBook(*(torch.cat(pair, dim=1) for pair in pairs), log_weight)

    def weighted(self, tokens: torch.Tensor, weight: float) -> "TokenBook":
        """The same tokens; the weight of `tokens`, (B, tokens), is multiplied by `weight`."""
        return replace(self, log_weight=self.weights() + tokens * math.log(weight))

    def of_same(self, frames: Sequence[int], num_tokens: int) -> "TokenBook":
        """All tokens of some latent frames, held and weighted as they are in this book."""
        book = TokenBook.of_frames(frames, num_tokens, len(self.held))
        columns = self.columns(frames, num_tokens).flatten(1)
        weight = None if self.log_weight is None else self.log_weight.gather(1, columns.clamp_min(0)) * (columns >= 0)
        return replace(book, held=columns >= 0, log_weight=weight)

    # 2. Questions

    def weights(self) -> torch.Tensor:
        """The log weight of each token, (B, tokens), in fp32; 0 without weights."""
        return torch.zeros(self.held.shape, dtype=torch.float32) if self.log_weight is None else self.log_weight

    def is_shared(self) -> bool:
        """Whether all rows hold the same tokens, without padding."""
        alike = [(table == table[:1]).all() for table in (self.frame, self.token)]
        return bool(self.held.all() and alike[0] and alike[1])

    def columns(self, frames: Sequence[int], num_tokens: int) -> torch.Tensor:
        """The column of each token of ascending `frames`, (B, frames, num_tokens); -1 where it is not held."""
        columns = torch.full((len(self.held), len(frames), num_tokens), -1)
        video, column = self.held.nonzero(as_tuple=True)
        frame, token = self.frame[video, column], self.token[video, column]
        known = torch.isin(frame, torch.tensor(frames, dtype=torch.long))
        place = torch.searchsorted(torch.tensor(frames, dtype=torch.long), frame[known])
        columns[video[known], place, token[known]] = column[known]
        return columns

    def named(self, tokens: Mapping[int, Iterable[int]], first_frame: int, sink: Sequence[int]) -> torch.Tensor:
        """Which held tokens have the grid indices `tokens[video]`, from `first_frame` on and outside the frames of
        `sink`, (B, tokens)."""
        named, sink = torch.zeros_like(self.held), torch.tensor(sink, dtype=torch.long)
        for video, indices in tokens.items():
            is_named = torch.isin(self.token[video], torch.tensor(sorted(indices), dtype=torch.long))
            named[video] = is_named & (self.frame[video] >= first_frame) & ~torch.isin(self.frame[video], sink)
        return named & self.held


@dataclass(frozen=True)
class Compaction:
    """How the tokens that stay close the gaps of those that leave.

    Args:
        columns (`torch.Tensor`): the old column of each token that stays, (B, kept); rows that keep fewer are padded.
        first (`int`): the first column that changes.
        shift (`int`, *optional*): columns by which all tokens from `first` on move to the left; `None`: they differ.
    """

    columns: torch.Tensor
    first: int
    shift: int | None

    @classmethod
    def of(cls, held: torch.Tensor) -> "Compaction":
        """Move the tokens that are `held`, (B, tokens), to the front of each row, in order."""
        columns = held.byte().argsort(dim=1, descending=True, stable=True)[:, : int(held.sum(dim=1).max())]
        places = torch.arange(columns.shape[1])
        first = int((columns == places).all(dim=0).cumprod(dim=0).sum())
        shifts = (columns - places)[:, first:].unique().tolist()
        return cls(columns, first, shifts[0] if len(shifts) == 1 else None)
