"""The autoencoder: pixels to latents, each frame separately.

It is an `AutoencoderKLWan` whose causal kernels are zero wherever they look back in time. It trains on single frames, three
times as fast, and works for clips of any length.
"""

from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from PIL import Image
from torch import Tensor, nn

from .loop import fit, make_optimizers, mixed_precision, write_atomically
from .sizes import SMALL, Sizes


KL_WEIGHT = 2e-4  # per latent element


def make_autoencoder(sizes: Sizes = SMALL) -> AutoencoderKLWan:
    """A small Wan 2.2 autoencoder: patches of pixels become channels, one more level halves the grid.

    Every residual branch starts at zero, so the first steps use only the pixel (un)shuffling shortcuts.
    """
    encoder_dim, decoder_dim = sizes.base_dims
    vae = AutoencoderKLWan(
        base_dim=encoder_dim,
        decoder_base_dim=decoder_dim,
        z_dim=sizes.latent_channels,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        is_residual=True,
        patch_size=sizes.patch,
        in_channels=3 * sizes.patch**2,
        out_channels=3 * sizes.patch**2,
        latents_mean=[0.0] * sizes.latent_channels,
        latents_std=[1.0] * sizes.latent_channels,
        scale_factor_temporal=1,
        scale_factor_spatial=2 * sizes.patch,
    )
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "resample.1", "proj")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.constant_(vae.quant_conv.bias[sizes.latent_channels :], -6)  # log variance: little noise at first
    return vae


class FrameConv3d(WanCausalConv3d):
    """A causal convolution on clips of one frame, as a 2D convolution: the other two thirds read padding."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        frame = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self._padding[2::-2])
        return frame[:, :, None]


def as_frames(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Turn `vae` into a faster one for clips of one frame, in which no kernel looks back in time."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.__class__ = FrameConv3d
            with torch.no_grad():
                module.weight[:, :, :-1] = 0
    return vae


def encode(vae: nn.Module, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents, each (N, C, 1, H / scale, W / scale), of frames (N, 3, 1, H, W) in [-1, 1].

    Without temporal resampling, one pass over a clip of any length equals `vae.encode`, which encodes groups of frames.
    """
    mean, log_variance = vae.quant_conv(vae.encoder(patchify(frames, vae.config.patch_size))).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-20, 10)


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Frames, (N, 3, 1, H, W), not clamped to [-1, 1], from latents of `encode`."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents)), vae.config.patch_size).float()


def sample_batch(world: ModuleType, generator: torch.Generator, num_frames: int) -> Tensor:
    """Frames of `num_frames` different videos, (N, 3, 1, H, W) in [-1, 1]; half are first frames."""
    times = torch.randint(-40, 40, (num_frames,), generator=generator).clamp(min=0).tolist()
    return torch.stack([world.sample_clip(generator, 1, time)[1] for time in times]).transpose(1, 2) * 2 - 1


def autoencoder_loss(world: ModuleType, vae: nn.Module, generator: torch.Generator) -> Tensor:
    """Absolute and squared error of the pixels, absolute error of their differences, and a weak KL term."""
    frames = sample_batch(world, generator, world.SIZES.num_frames)
    with mixed_precision():
        mean, log_variance = encode(vae, frames)
        noise = torch.randn(mean.shape, generator=generator)
        error = decode(vae, mean + (0.5 * log_variance).exp() * noise) - frames
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 0.5 * edges + 2 * error.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def measure_psnr(world: ModuleType, vae: nn.Module, num_frames: int = 128, seed: int = 10_000) -> float:
    """Peak signal-to-noise ratio in dB, averaged over held-out frames."""
    frames = sample_batch(world, torch.Generator().manual_seed(seed), num_frames)
    error = (decode(vae, encode(vae, frames)[0]).clamp(-1, 1) - frames) / 2
    return -10 * error.square().mean(dim=(1, 2, 3, 4)).log10().mean().item()


def save_strip(videos: list[Tensor], path: Path, stride: int = 1, zoom: int = 2) -> None:
    """A film strip as PNG: one row per video (3, T, H, W) in [0, 1], every `stride`-th frame."""
    rows = [torch.cat(list(video.clamp(0, 1)[:, ::stride].transpose(0, 1)), dim=2) for video in videos]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
    image = Image.fromarray(pixels)
    image = image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)
    write_atomically(path, image.save)


@torch.no_grad()
def save_reconstructions(world: ModuleType, vae: nn.Module, path: Path, num_rows: int = 5) -> None:
    """Held-out frames, each row above its reconstructions."""
    generator, rows = torch.Generator().manual_seed(20_000), []
    for _ in range(num_rows):
        frames = sample_batch(world, generator, 10)
        for each in (frames, decode(vae, encode(vae, frames)[0])):
            rows.append((each[:, :, 0].transpose(0, 1) + 1) / 2)
    save_strip(rows, path)


def train_autoencoder(
    world: ModuleType, folder: Path, minutes: float, seed: int, start: AutoencoderKLWan | None = None
) -> AutoencoderKLWan:
    """Train for `minutes` in total, earlier runs included. Returns the moving average of the weights.

    `start` is an autoencoder whose weights are trained further.
    """
    torch.manual_seed(seed)
    vae = as_frames(make_autoencoder(world.SIZES))
    if start is not None:
        vae.load_state_dict(start.state_dict())

    def on_save(ema: AutoencoderKLWan, step: int, minutes: float) -> None:
        print(f"{folder.name}: step {step}, PSNR {measure_psnr(world, ema):.2f} dB", flush=True)
        save_reconstructions(world, ema, folder / "samples.png")

    optimizers = make_optimizers(vae, lambda name, param: param.ndim >= 4 and "conv_" not in name, lr=2e-3)
    loss = partial(autoencoder_loss, world)
    return fit(vae, loss, optimizers, folder, minutes, seed, on_save, ema_decay=0.998, save_minutes=2.5)


def measure_statistics(latents: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of latents (N, C, T, H, W)."""
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()
