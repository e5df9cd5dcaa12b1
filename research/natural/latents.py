# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Natural latents: photographs seen by a moving camera, encoded into 16 channels, and the drifts that are put on them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from research.training.autoencoder import encode
from research.training.photographs import FOLDER, load_photograph


NUM_CHANNELS = 16
PATCH = 8  # pixels along height and width of one latent place
HEIGHT, WIDTH = 192, 256  # of a frame, in pixels
NUM_FRAMES = 3  # of a chunk
PACE = 4  # pixels that the camera moves from frame to frame
SHIFT, ZOOM = (60, 20), 1.06  # of the second chunk's camera: pixels right and down, and scale

Encoder = Callable[[torch.Tensor], torch.Tensor]  # frames (T, 3, H, W) in [0, 1] -> latents (C, T, H / 8, W / 8)


def load_photographs(folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """All photographs of a folder by name, (3, H, W) in [0, 1]."""
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise ValueError(f"the folder {folder} has no photograph (*.jpg)")
    return {path.stem: load_photograph(path) for path in paths}


def film(photograph: torch.Tensor, left: float, top: float, zoom: float) -> torch.Tensor:
    """A chunk of a camera that pans right over a photograph, (T, 3, H, W)."""
    height, width, frames = round(HEIGHT / zoom), round(WIDTH / zoom), []
    for index in range(NUM_FRAMES):
        x, y = round(left + PACE * index), round(top)
        part = photograph[None, :, y : y + height, x : x + width]
        frames.append(F.interpolate(part, (HEIGHT, WIDTH), mode="bilinear", antialias=True))
    return torch.cat(frames)


class PatchEncoder:
    """Principal components of 8 x 8 patches, each with mean 0 and standard deviation 1 over the photographs."""

    def __init__(self, photographs: dict[str, torch.Tensor]):
        patches = torch.cat([self._patches(each[None]).flatten(2)[0].T for each in photographs.values()])
        self.mean = patches.mean(dim=0)
        _, spread, basis = torch.linalg.svd(patches - self.mean, full_matrices=False)
        scale = spread[:NUM_CHANNELS] / (len(patches) - 1) ** 0.5
        self.basis = basis[:NUM_CHANNELS] / scale[:, None]  # (C, 192)

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        patches = self._patches(frames).movedim(1, -1) - self.mean
        return (patches @ self.basis.T).permute(3, 0, 1, 2)

    @staticmethod
    def _patches(frames: torch.Tensor) -> torch.Tensor:
        """(T, 3, H, W) -> (T, 192, H / 8, W / 8)."""
        return F.pixel_unshuffle(frames, PATCH)


class WorldEncoder:
    """The autoencoder of a checkpoint, normalized by the statistics in its config."""

    def __init__(self, checkpoint: Path):
        self.vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae").eval()
        self.mean, self.std = (
            torch.tensor(values).view(-1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )

    @torch.no_grad()
    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        latents = encode(self.vae, 2 * frames[:, :, None] - 1)[0][:, :, 0]
        return (latents.transpose(0, 1) - self.mean) / self.std


@dataclass(frozen=True)
class Pair:
    """A photograph's chunks, (C, T, H, W) each.

    Args:
        reference (`torch.Tensor`): the chunk that others are held to.
        moved (`torch.Tensor`): the same photograph, seen by a camera that has moved.
        half_new (`torch.Tensor`): `moved`, with another photograph in its right half.
    """

    name: str
    reference: torch.Tensor
    moved: torch.Tensor
    half_new: torch.Tensor


def make_pairs(photographs: dict[str, torch.Tensor], encoder: Encoder) -> list[Pair]:
    """One pair for each photograph; its other photograph is the next one."""
    names, pairs = list(photographs), []
    chunks = {name: film(each, SHIFT[0], SHIFT[1], ZOOM) for name, each in photographs.items()}
    for name, other in zip(names, [*names[1:], names[0]]):
        mixed = chunks[name].clone()
        mixed[..., WIDTH // 2 :] = chunks[other][..., WIDTH // 2 :]
        reference = encoder(film(photographs[name], 0, 0, 1.0))
        pairs.append(Pair(name, reference, encoder(chunks[name]), encoder(mixed)))
    return pairs


def draw_direction(seed: int) -> torch.Tensor:
    """A random direction over channels, (C, 1, 1, 1), of root mean square 1."""
    direction = torch.randn(NUM_CHANNELS, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return direction / direction.square().mean().sqrt()


def offset(latents: torch.Tensor, seed: int, size: float) -> torch.Tensor:
    """The same for every place: `size` standard deviations, root mean square over channels."""
    return (size * draw_direction(seed)).expand_as(latents)


def gain(latents: torch.Tensor, seed: int, size: float) -> torch.Tensor:
    """Contrast: every channel grows by the share `size` about its mean."""
    return size * (latents - latents.mean(dim=(1, 2, 3), keepdim=True))


def gradient(latents: torch.Tensor, seed: int, size: float) -> torch.Tensor:
    """A slow change over the picture, from -1 to 1 times `size` standard deviations from left to right."""
    return (size * draw_direction(seed) * torch.linspace(-1, 1, latents.shape[-1])).expand_as(latents)


DRIFTS = {  # name in the table: (what, how much)
    "offset 0.1": (offset, 0.1),
    "offset 0.3": (offset, 0.3),
    "gain 0.2": (gain, 0.2),
    "gradient 0.3": (gradient, 0.3),
}
