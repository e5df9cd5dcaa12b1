# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The random draws of a rollout: initial noise of each chunk, and the noise that re-noises it after each step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..tokentrim_checks import check, check_tensor
from .plan import Sizes
from .schedule import Scheduler


class Noise:
    """The initial noise of each chunk, (B, C, frames, H, W) in fp32: drawn chunk by chunk, or given for all chunks.

    Args:
        sizes ([`Sizes`]): the sizes of the chunks.
        generator (`torch.Generator` or `list[torch.Generator]`): source of the draws.
        device (`torch.device`): where the noise goes.
        given (`torch.Tensor`, *optional*): the noise of all chunks, (B, C, T, H, W), instead of draws.
    """

    def __init__(
        self,
        sizes: Sizes,
        generator: torch.Generator | list[torch.Generator],
        device: torch.device,
        given: torch.Tensor | None = None,
    ):
        self.sizes = sizes
        self.generator = generator
        self.device = device
        self.chunks: dict[int, torch.Tensor] = {}  # drawn, and not forgotten
        if given is not None:
            chunks = given.to(device, torch.float32).split(sizes.chunk_partition, dim=2)
            self.chunks = dict(enumerate(chunks))
        self.num_drawn = len(self.chunks)

    def __getitem__(self, index: int) -> torch.Tensor:
        while self.num_drawn <= index:
            num_videos, channels, *size = self.sizes.frame_shape
            shape = (num_videos, channels, self.sizes.chunk_size(self.num_drawn), *size)
            noise = randn_tensor(shape, generator=self.generator, device=self.device, dtype=torch.float32)
            self.chunks[self.num_drawn] = noise
            self.num_drawn += 1
        return self.chunks[index]

    def forget(self, index: int) -> None:
        """Drop the noise of chunk `index`, which is finished."""
        self.chunks.pop(index, None)


class Renoise:
    """The noise that re-noises each chunk after each step, drawn once, so that a regeneration repeats it.

    Args:
        given (`Callable`, *optional*): `given(chunk, step)` returns (B, C, frames, H, W), instead of draws.
        generator (`torch.Generator` or `list[torch.Generator]`): source of the draws.
        frame_shape (`tuple`): shape of the latents of a frame, (B, C, H, W).
        num_in_flight (`int`): chunks denoised together, whose draws are kept.
        device (`torch.device`): where the noise goes.
    """

    def __init__(
        self,
        given: Callable | None,
        generator: torch.Generator | list[torch.Generator],
        frame_shape: Sequence[int],
        num_in_flight: int,
        device: torch.device,
    ):
        self.given = given
        self.generator = generator
        self.frame_shape = frame_shape
        self.num_in_flight = num_in_flight
        self.device = device
        self.drawn: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, chunk: int, step: int, num_frames: int) -> torch.Tensor:
        """The noise of a chunk after a step, (B, C, num_frames, H, W), in fp32."""
        if (chunk, step) not in self.drawn:
            self.drawn = {key: noise for key, noise in self.drawn.items() if key[0] > chunk - self.num_in_flight}
            shape = (*self.frame_shape[:2], num_frames, *self.frame_shape[2:])
            if self.given is None:
                noise = randn_tensor(shape, generator=self.generator, device=self.device, dtype=torch.float32)
            else:
                noise, name = self.given(chunk, step), f"renoise({chunk}, {step})"
                check_tensor(name, noise, 5, "(batch, channels, latent frames, height, width)")
                check(tuple(noise.shape) == shape, name, noise, f"of shape {shape}")
            self.drawn[chunk, step] = noise.detach().to(self.device, torch.float32)
        return self.drawn[chunk, step]


def check_draws(generator: Any, latents: torch.Tensor | None, shape: Sequence[int]) -> None:
    """The initial noise, or what it is drawn from, fits videos of `shape` (B, C, T, H, W)."""
    if latents is not None:
        check(tuple(latents.shape) == tuple(shape), "latents", latents, f"of shape {tuple(shape)} for this call")
    generators = generator if isinstance(generator, list) else [generator]
    of_type = generator is None or all(isinstance(each, torch.Generator) for each in generators)
    check(of_type, "generator", generator, "a torch.Generator or a list of them", TypeError)
    fits = not isinstance(generator, list) or len(generator) == shape[0]
    check(fits, "generator", generator, f"one generator or a list of {shape[0]}, one for each video")


def make_solver_generators(
    scheduler: Scheduler, generator: torch.Generator | list[torch.Generator], num_videos: int
) -> list[torch.Generator] | None:
    """One generator for each video, for schedulers that draw inside `step`, since a regeneration replays the draws of
    some videos. Their seeds come from a copy of the noise's generator, so that the noise does not depend on the
    scheduler."""
    if not scheduler.draws_inside:
        return None
    given = generator if isinstance(generator, list) else [generator]
    seeds = []
    for each in given:
        copied = torch.Generator(each.device)
        copied.set_state(each.get_state())
        seeds += torch.randint(2**62, (num_videos // len(given),), generator=copied, device=each.device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_like(generator: Any, known: torch.Generator | list[torch.Generator]) -> None:
    """Refuse what cannot take the place of the generators of a run."""
    theirs, ours = (each if isinstance(each, list) else [each] for each in (generator, known))
    of_type = isinstance(generator, list) == isinstance(known, list) and len(theirs) == len(ours)
    of_type = of_type and all(isinstance(each, torch.Generator) for each in theirs)
    valid = f"a list of {len(ours)} generators" if isinstance(known, list) else "a torch.Generator"
    check(of_type, "generator", generator, f"{valid}, as the call's", TypeError)
    for each, our in zip(theirs, ours):
        check(each.device.type == our.device.type, "generator", str(each.device), f"on {our.device}, as the call's")


def copy_states(generator: torch.Generator | list, known: torch.Generator | list) -> None:
    """Let known generators draw what others would."""
    theirs, ours = (each if isinstance(each, list) else [each] for each in (generator, known))
    for each, our in zip(theirs, ours):
        our.set_state(each.get_state())
