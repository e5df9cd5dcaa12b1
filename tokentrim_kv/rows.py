# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The rows of the transformer's batch: which video and which guidance branch each is."""

from dataclasses import dataclass

import torch


@dataclass
class BatchRows:
    """The rows of a forward: video v of B is rows v, v + B, ..., one in each guidance branch.

    A forward without guidance carries the last branch alone, the conditional one.

    Args:
        num_videos (`int`): B.
        videos (`list[int]`, *optional*): the videos that forwards carry; `None`: all.
    """

    num_videos: int
    videos: list[int] | None = None

    def num_branches(self, num_rows: int) -> int:
        """Guidance branches of a forward of `num_rows`."""
        return num_rows // (self.num_videos if self.videos is None else len(self.videos))

    def of_forward(self, table: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The `num_rows` rows of a forward, of a table of all rows, (branches * B, ...)."""
        first = len(table) - self.num_branches(num_rows) * self.num_videos
        if self.videos is None:
            return table[first:] if first else table
        starts = range(first, len(table), self.num_videos)
        return table[[start + video for start in starts for video in self.videos]]

    def as_slice(self, num_held: int, num_rows: int) -> slice | None:
        """The rows of a forward among `num_held`, for a view without a copy; `None` if no slice has them."""
        first = num_held - self.num_branches(num_rows) * self.num_videos
        if self.videos is None:
            return slice(first, None)
        return slice(first + self.videos[0], None, self.num_videos) if len(self.videos) == 1 else None

    def repeated(self, table: torch.Tensor, num_rows: int) -> torch.Tensor:
        """A table of all videos, (B, ...), for `num_rows` rows, (branches * B, ...)."""
        if len(table) == num_rows:
            return table
        return table.repeat(num_rows // self.num_videos, *[1] * (table.ndim - 1))

    def masked(self, mask: torch.Tensor, num_rows: int) -> torch.Tensor:
        """A mask of all videos, (B, keys), for the rows of a forward, (num_rows, 1, 1, keys)."""
        mask = mask if self.videos is None else mask[self.videos]
        return mask.repeat(num_rows // len(mask), 1)[:, None, None, :]
