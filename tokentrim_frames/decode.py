# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Latents to frames, chunk by chunk: concatenated, the frames are those of one decode of all latents.

A decoder holds the temporal cache of one video (or batch) and leaves nothing on the VAE, so several can share it.
"""

import inspect
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..tokentrim_checks import check, check_int


PREVIEW_OVERLAP = 8  # latent frames; TAEHV's decoder remembers 3 + 3 + 3 / 2


class FrameDecoder:
    r"""
    Decodes the latents of an [`AutoencoderKLWan`] chunk by chunk, with the same bits as `vae.decode` of all latents (fp32,
    CPU, latent frames of at least 12 positions; for fewer, torch rounds a convolution of one frame differently).

    Args:
        vae ([`AutoencoderKLWan`]):
            The decoder calls its `decode` if that accepts `cache=`, otherwise its `post_quant_conv` and `decoder`, behind its
            offload hook. With slicing enabled, every video is decoded separately.

    Raises:
        `ValueError`: tiling is enabled (here or at a later [`decode`]).
    """

    def __init__(self, vae: Any):
        self.vae = vae
        self.refuse_tiling()
        self.shape = None  # (B, C, H, W) of every chunk of this video
        self.features = None  # one list per forward: of the batch, or of each video

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        r"""
        Decode the next chunk. If it raises, the decoder is unchanged.

        Args:
            latents (`torch.Tensor`): of the transformer, (B, C, latent frames, H, W).

        Returns:
            `torch.Tensor`: (B, 3, frames, height, width) in [-1, 1], in the VAE's dtype.

        Raises:
            `ValueError`: the shape differs from earlier chunks, or tiling is enabled.
        """
        check(latents.ndim == 5 and latents.shape[2] > 0, "latents", latents, "(B, C, T, H, W) with T > 0")
        shape = [*latents.shape[:2], *latents.shape[3:]]
        if self.shape is not None:
            before = "({}, {}, T, {}, {})".format(*self.shape)
            check(shape == self.shape, "latents", latents, f"{before} like the chunks before")
        self.refuse_tiling()
        latents = self.scaled(latents)
        features = self.features
        if features is None:
            by_video = len(latents) if getattr(self.vae, "use_slicing", False) else 1
            features = [None] * by_video
        parts = latents.chunk(len(features))
        decoded = [self.decode_part(part, past) for part, past in zip(parts, to_device(features, latents.device))]
        self.shape, self.features = shape, [new for _, new in decoded]
        return torch.cat([frames for frames, _ in decoded])

    def state_dict(self) -> dict:
        """The state that the next chunk depends on, as lists of tensors, `None` and strings (Wan marks a first frame "Rep")."""
        return {"shape": self.shape, "features": self.features}

    def load_state_dict(self, state: dict) -> None:
        """Continue from the state of another decoder of the same VAE."""
        self.shape = None if state["shape"] is None else list(state["shape"])
        self.features = None if state["features"] is None else list(state["features"])

    def try_out(self, frame_shape: Sequence[int], device: torch.device) -> None:
        """Decode a latent frame of zeros, (B, C, H, W), behind a loaded state, so that a state that does not fit the VAE
        raises before a run continues. Changes nothing."""
        valid = f"of a run of the same call, with frames of shape {tuple(frame_shape)}"
        check(self.shape in (None, list(frame_shape)), "state", self.shape, valid)
        before = self.state_dict()
        if self.features is not None:
            self.decode(torch.zeros(frame_shape, device=device)[:, :, None])
            self.load_state_dict(before)

    def refuse_tiling(self) -> None:
        if getattr(self.vae, "use_tiling", False):
            raise ValueError(
                "Frames cannot be decoded chunk by chunk while the VAE tiles them: call `vae.disable_tiling()`. "
                "A chunk needs little memory without tiling."
            )

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents in the VAE's scale and dtype."""
        return scaled_latents(self.vae, latents)

    def decode_part(self, latents: torch.Tensor, features: list | None) -> tuple[torch.Tensor, list]:
        """Returns frames, and the features that the next chunk reads."""
        if takes_cache(self.vae) and not self.vae.use_slicing:  # with both, `decode` refuses
            return decode_with_cache(self.vae, latents, features)
        return decode_with_features(self.vae, latents, features)


class PreviewDecoder(FrameDecoder):
    r"""
    The same for a small VAE that reads the transformer's latents directly, without `latents_mean` and `latents_std`.

    Args:
        vae (`torch.nn.Module`):
            One of:
            - `decode(z, return_dict=False, cache=)` of Diffusers' `AutoencoderTinyVideo`: (B, C, T, H, W) to
              (B, 3, frames, H, W) in [-1, 1]. Exact;
            - `decode_video(z, show_progress_bar=False)` of TAEHV: (B, T, C, H, W) to (B, frames, 3, H, W) in
              [0, 1];
            - `decode(z)` with Diffusers' shapes and range, which returns a tensor, a tuple, or an output with `sample`.
            The last two keep no state: each call decodes the last `overlap` latent frames again.
        temporal_factor (`int`, defaults to `4`): frames of a latent frame (the first one of a video may give fewer).
        overlap (`int`, defaults to `8`): latent frames decoded before a chunk; TAEHV remembers 8.
    """

    def __init__(self, vae: Any, temporal_factor: int = 4, overlap: int = PREVIEW_OVERLAP):
        has_decode = callable(getattr(vae, "decode", None)) or callable(getattr(vae, "decode_video", None))
        check(has_decode, "preview_vae", type(vae).__name__, "a module with `decode` or `decode_video`", TypeError)
        check_int("temporal_factor", temporal_factor, 1)
        check_int("overlap", overlap, 1)
        super().__init__(vae)
        self.temporal_factor = temporal_factor
        self.overlap = overlap

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.to(next(self.vae.parameters(), latents).dtype)

    def decode_part(self, latents: torch.Tensor, features: list | None) -> tuple[torch.Tensor, list]:
        if takes_cache(self.vae):
            return decode_with_cache(self.vae, latents, features)
        past = latents if features is None else torch.cat([*features, latents], dim=2)
        frames = decode_whole(self.vae, past)
        if features is not None:
            num_new = self.temporal_factor * latents.shape[2]
            if frames.shape[2] < num_new:
                raise ValueError(
                    f"The preview VAE gives {frames.shape[2]} frames for {past.shape[2]} latent frames, but "
                    f"`temporal_factor` is {self.temporal_factor}."
                )
            frames = frames[:, :, -num_new:]
        return frames, [past[:, :, -self.overlap :].clone()]


def make_decoder(vae: Any, preview_vae: Any = None, temporal_factor: int = 4) -> FrameDecoder:
    """A decoder for one video or batch: of `preview_vae` if it is set, otherwise of the pipeline's VAE."""
    return FrameDecoder(vae) if preview_vae is None else PreviewDecoder(preview_vae, temporal_factor)


def scaled_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The transformer's latents, (B, C, T, H, W), in the scale and dtype of an `AutoencoderKLWan`."""
    scale = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
    mean, std = scale.view(2, 1, -1, 1, 1, 1)
    return (latents * std.to(latents) + mean.to(latents)).to(vae.dtype)


@contextmanager
def latents_kept(latents: torch.Tensor) -> Iterator[None]:
    """Attach `latents` to an error of the decoding inside, for example out of memory, so that the run is not lost."""
    try:
        yield
    except Exception as error:
        error.latents = latents
        error.add_note("The latents are kept as `latents` of this error: `pipe.decode_latents(error.latents, 'np')`.")
        raise


def decode_all(pipe: Any, latents: torch.Tensor, output_type: str, num_frames: int | None) -> Any:
    """Decode all latents at once, or their first frames; returns no frames if a run was interrupted in its first chunk."""
    with latents_kept(latents):
        if latents.shape[2] > 0:
            video = pipe.vae.decode(scaled_latents(pipe.vae, latents), return_dict=False)[0]
        else:
            height, width = (side * pipe.vae_scale_factor_spatial for side in latents.shape[3:])
            video = latents.new_zeros(len(latents), 3, 0, height, width)
        return pipe.video_processor.postprocess_video(video[:, :, :num_frames], output_type=output_type)


@apply_forward_hook  # `vae.decode` does this, `vae.decoder` does not
def decode_with_features(vae: Any, latents: torch.Tensor, features: list | None) -> tuple[torch.Tensor, list]:
    """`AutoencoderKLWan._decode`, with the features of its causal convolutions as a value."""
    num_features = sum(isinstance(module, torch.nn.Conv3d) for module in vae.decoder.modules())
    first = features is None
    features = [None] * num_features if first else list(features)
    latents = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        frame = latents[:, :, index : index + 1]
        frames.append(vae.decoder(frame, feat_cache=features, feat_idx=[0], first_chunk=first and index == 0))
    frames = torch.cat(frames, dim=2)
    if vae.config.patch_size is not None:
        frames = join_patches(frames, vae.config.patch_size)
    return frames.clamp(-1.0, 1.0), features


def decode_with_cache(vae: Any, latents: torch.Tensor, features: list | None) -> tuple[torch.Tensor, list]:
    """`vae.decode(z, cache=)`: the cache object has one attribute, `None` or a list."""
    cache = cache_type(vae)()
    (name,) = vars(cache)
    setattr(cache, name, None if features is None else list(features))
    frames = vae.decode(latents, return_dict=False, cache=cache)[0]
    return frames, getattr(cache, name)


@apply_forward_hook
def decode_whole(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """One call of a VAE without state, with Diffusers' shapes and range."""
    if hasattr(vae, "decode_video"):  # TAEHV: (B, T, C, H, W), [0, 1]
        return vae.decode_video(latents.transpose(1, 2), show_progress_bar=False).transpose(1, 2) * 2 - 1
    decoded = vae.decode(latents)
    if isinstance(decoded, torch.Tensor):
        return decoded
    return decoded.sample if hasattr(decoded, "sample") else decoded[0]


def takes_cache(vae: Any) -> bool:
    decode = getattr(vae, "decode", None)
    return decode is not None and "cache" in inspect.signature(decode).parameters


def cache_type(vae: Any) -> type:
    """The class in the annotation of `decode`: `WanDecodeCache` of `cache: WanDecodeCache | None`."""
    hint = typing.get_type_hints(type(vae).decode)["cache"]
    return next(each for each in (*typing.get_args(hint), hint) if each is not type(None))


def to_device(features: Any, device: torch.device) -> Any:
    """Move lists of lists of tensors to the device of the latents, because a loaded state may lie elsewhere."""
    if isinstance(features, list):
        return [to_device(each, device) for each in features]
    return features.to(device) if isinstance(features, torch.Tensor) else features


def join_patches(frames: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3 p p, T, H, W) to (B, 3, T, H p, W p), in the order of Wan 2.2: channel, column, row."""
    frames = frames.unflatten(1, (-1, patch_size, patch_size))  # (B, 3, column, row, T, H, W)
    return frames.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
