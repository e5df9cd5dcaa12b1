# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Re-anchoring at commit, ours and not the paper's: what becomes context is held to the first chunk's statistics.

Drift of a long rollout is mostly slow and global: every chunk is a little off the one before it, is read back, and is
taken for the truth. Moving the statistics of what is read back to those of the first chunk breaks that loop. The
chunk that is shown stays as it was generated.
"""

import torch


def match_mean(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Latents with the reference's mean in each channel, (C, T, H, W), (C, any) -> (C, T, H, W)."""
    values, of_reference = latents.flatten(1), reference.flatten(1)
    return (values - values.mean(1, keepdim=True) + of_reference.mean(1, keepdim=True)).view_as(latents)


def match_moments(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Latents with the reference's mean and standard deviation in each channel, as AdaIN (arXiv 1703.06868)."""
    values, of_reference = latents.flatten(1), reference.flatten(1)
    spread = of_reference.std(1, keepdim=True) / values.std(1, keepdim=True).clamp_min(1e-6)
    return ((values - values.mean(1, keepdim=True)) * spread + of_reference.mean(1, keepdim=True)).view_as(latents)


def match_histogram(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Latents with the reference's distribution of values in each channel: the n-th smallest becomes the n-th smallest."""
    order = latents.flatten(1).argsort(dim=1)
    values = reference.flatten(1).sort(dim=1).values
    if values.shape != order.shape:
        values = torch.nn.functional.interpolate(values[None], order.shape[1], mode="linear", align_corners=True)[0]
    return torch.empty_like(values).scatter_(1, order, values).view_as(latents)


REANCHORINGS = {"mean": match_mean, "moments": match_moments, "histogram": match_histogram}


def offset(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Distance of the channels' means, in standard deviations of the reference, root mean square over channels."""
    values, of_reference = latents.flatten(1), reference.flatten(1)
    distance = (values.mean(1) - of_reference.mean(1)) / of_reference.std(1).clamp_min(1e-6)
    return distance.square().mean().sqrt().item()


class Anchor:
    """What each video of a batch is held to: its first chunk, until it is far enough away to be meant.

    Args:
        reanchor (`str`, *optional*): which statistics, one of `REANCHORINGS`; `None` leaves every chunk as it is.
        tolerance (`float`, *optional*): the `offset` from which on a change is taken for meant: such a chunk stays as
            it is and is the anchor from then on. `None`: never.
    """

    def __init__(self, reanchor: str | None = None, tolerance: float | None = None):
        self.match = REANCHORINGS.get(reanchor)
        self.tolerance = tolerance
        self.references: list[torch.Tensor] | None = None  # each (C, T, H, W)

    def hold(self, chunk: torch.Tensor) -> torch.Tensor:
        """What becomes context in the place of an accepted chunk, (B, C, T, H, W)."""
        if self.match is None:
            return chunk
        if self.references is None:
            self.references = list(chunk)
            return chunk
        held = []
        for video, latents in enumerate(chunk):
            if self.tolerance is not None and offset(latents, self.references[video]) > self.tolerance:
                self.references[video] = latents
            held.append(self.match(latents, self.references[video]))
        return torch.stack(held)
