# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The book of tokens: which latent frame and grid token each column of a cache is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


def take_tokens(by_token: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Tokens of (rows, tokens, ...) by `columns`, (rows, taken)."""
    return by_token[torch.arange(len(columns), device=columns.device)[:, None], columns]


@dataclass
class TokenBook:
    """Which (latent frame, index among the places) each token of a sequence is, (B, tokens) each; `held` is False where
    a row is padding, or where nobody may attend to the token; `log_weight` is added to its scores, if there is one."""

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

    def taken(self, columns: torch.Tensor, held: torch.Tensor) -> "TokenBook":
        """The tokens at `columns`, (B, taken), of which `held`, (B, tokens), are."""
        log_weight = None if self.log_weight is None else self.log_weight.gather(1, columns)
        return TokenBook(*(table.gather(1, columns) for table in (self.frame, self.token, held)), log_weight)

    def since(self, column: int) -> "TokenBook":
        """The tokens from `column` on."""
        log_weight = None if self.log_weight is None else self.log_weight[:, column:]
        return TokenBook(self.frame[:, column:], self.token[:, column:], self.held[:, column:], log_weight)

    def appended(self, other: "TokenBook") -> "TokenBook":
        pairs = ((self.frame, other.frame), (self.token, other.token), (self.held, other.held))
        log_weight = None
        if self.log_weight is not None or other.log_weight is not None:
            both = (
                torch.zeros(book.held.shape, dtype=torch.float32) if book.log_weight is None else book.log_weight
                for book in (self, other)
            )
            log_weight = torch.cat(list(both), dim=1)
        return TokenBook(*(torch.cat(pair, dim=1) for pair in pairs), log_weight)

    def weighted(self, tokens: torch.Tensor, weight: float) -> "TokenBook":
        """With `tokens`, (B, tokens), counting `weight` times what they count for."""
        old = torch.zeros(self.held.shape, dtype=torch.float32) if self.log_weight is None else self.log_weight
        return replace(self, log_weight=old + tokens * math.log(weight))

    def of_same(self, frames: Sequence[int], num_tokens: int) -> "TokenBook":
        """All tokens of some latent frames, held and weighted as they are here."""
        book, columns = (
            TokenBook.of_frames(frames, num_tokens, len(self.held)),
            self.columns(frames, num_tokens).flatten(1),
        )
        weight = None if self.log_weight is None else self.log_weight.gather(1, columns.clamp_min(0)) * (columns >= 0)
        return replace(book, held=columns >= 0, log_weight=weight)

    def is_shared(self) -> bool:
        """Whether all rows hold the same tokens, without padding."""
        alike = [(table == table[:1]).all() for table in (self.frame, self.token)]
        return bool(self.held.all() and alike[0] and alike[1])

    def columns(self, frames: Sequence[int], num_tokens: int) -> torch.Tensor:
        """Where each token of ascending `frames` is in the sequence, (B, frames, num_tokens); -1 where it is not held."""
        columns = torch.full((len(self.held), len(frames), num_tokens), -1)
        video, column = self.held.nonzero(as_tuple=True)
        frame, token = self.frame[video, column], self.token[video, column]
        known = torch.isin(frame, torch.tensor(frames, dtype=torch.long))
        place = torch.searchsorted(torch.tensor(frames, dtype=torch.long), frame[known])
        columns[video[known], place, token[known]] = column[known]
        return columns
