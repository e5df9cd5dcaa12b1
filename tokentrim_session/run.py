# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A run: its whole state between two chunks."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..tokentrim_backbones.backbone import Backbone
from ..tokentrim_backbones.hooks import adapters, check_hooks
from ..tokentrim_backbones.registry import backbone_of
from ..tokentrim_checks import check, check_int, check_number, check_saved, check_tensor
from ..tokentrim_policies.chain import ContextPolicies
from ..tokentrim_policies.registry import BUILT_IN
from ..tokentrim_policies.stability import token_grid
from .denoise import Denoiser
from .draft import InFlight
from .encode import encode_change
from .host import Pipeline
from .noise import Noise, Renoise, check_like, copy_states, make_solver_generators
from .plan import RolloutPlan
from .prompts import EncodedPrompt, PromptChange, blended, check_change, check_lengths, make_change


class Rollout:
    """A run that has started: the next chunk, the chunks in flight, and the parts that have a state.

    Args:
        pipe ([`Pipeline`]): the pipeline that it runs in.
        plan ([`RolloutPlan`]): the plan of the call.
        prompt ([`EncodedPrompt`]): the prompt of chunk 0.
        device (`torch.device`): the device of its latents.
        given (`torch.Tensor`, *optional*): clean latents of the frames to continue, (B, C, T, H, W).
    """

    def __init__(
        self,
        pipe: Pipeline,
        plan: RolloutPlan,
        prompt: EncodedPrompt,
        device: torch.device,
        given: torch.Tensor | None = None,
    ):
        self.pipe = pipe
        self.plan = plan
        self.sizes = sizes = plan.sizes
        self.device = device
        given_sizes = [sizes.chunk_size(index) for index in range(sizes.num_given_chunks)]
        self.given = [] if given is None else list(given.split(given_sizes, dim=2))
        self.changes: dict[int, tuple[torch.Tensor, str]] = {}  # embeddings (B, text, dim) and transition, by chunk
        self.guidance_scale = plan.schedule.guidance_scale  # between two chunks; a callback may change the pipeline's
        self.shows_steps = True  # whether a bar of denoising steps is shown
        self.index = 0
        self.in_flight: tuple[InFlight, ...] = ()

        generator = plan.inputs.generator
        if generator is None:  # not torch's global one, which other code draws from
            generator = torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        self.generator = generator
        transformer, patch_size = pipe.transformer, pipe.transformer.config.patch_size
        self.grid = token_grid(sizes.frame_shape[2:], patch_size)
        self.backbone: Backbone = backbone_of(transformer)(
            transformer, self.grid, sizes.num_videos, plan.layout, sizes.num_protected_frames, plan.options
        )
        self.policies = ContextPolicies(plan.method.policies, sizes.num_videos, self.grid, patch_size)
        self.noise = Noise(sizes, generator, device, plan.inputs.latents)
        num_in_flight, renoise = plan.schedule.num_in_flight, plan.callbacks.renoise
        renoise = Renoise(renoise, generator, sizes.frame_shape, num_in_flight, device)
        solver_generators = make_solver_generators(pipe.scheduler, generator, sizes.num_videos)
        self.denoiser = Denoiser(pipe, self.backbone, plan, prompt, self.noise, renoise, solver_generators)
        if plan.callbacks.on_step_end is not None:
            self.denoiser.on_step = self._call_back

    def remaining(self) -> Iterator[int]:
        """Yield the index of each chunk to go, after a look at what users changed on the transformer in between."""
        known = adapters(self.pipe.transformer)
        while self.sizes.has_chunk(self.index):
            check_hooks(self.pipe.transformer)
            if known != (known := adapters(self.pipe.transformer)):
                self.backbone.prompt_changed()  # other adapters project it otherwise
            yield self.index

    def is_last(self, index: int) -> bool:
        """Whether a chunk is the last one, which no other chunk reads."""
        return not self.sizes.has_chunk(index + 1)

    def evict(self, tokens: dict[int, list[int]]) -> dict[int, list[int]]:
        """Evict grid tokens of some videos from the context, and return those that it held, by video. A video that
        lost nothing is not generated again: the attempt would repeat itself."""
        evicted = self.backbone.evict(tokens, self.plan.method.prune_weight)
        self.policies.evicted(evicted)
        return evicted

    def advance(self, index: int) -> None:
        """Chunk `index` is finished: the tokens that leave before the next chunk do so, and the run can be saved."""
        if any(self.policies.leaving.values()) and not self.is_last(index):
            self.evict(self.policies.leaving)
        self.noise.forget(index)
        self.index, self.guidance_scale = index + 1, self.pipe.guidance_scale

    def change_generator(self, generator: torch.Generator | list[torch.Generator]) -> None:
        """Draw as from another generator from the next chunk on."""
        check_like(generator, self.generator)
        copy_states(generator, self.generator)
        solver_generators = make_solver_generators(self.pipe.scheduler, self.generator, self.sizes.num_videos)
        copy_states(solver_generators or [], self.denoiser.solver_generators or [])

    def num_steps_left(self) -> float:
        """Denoising steps to go, regenerations not counted."""
        steps = self.plan.count_steps(len(self.pipe.scheduler.timesteps), self.index)
        return steps - sum(chunk.step > 0 for chunk in self.in_flight)  # each in flight is a step ahead

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which the pipeline has this run's schedule and guidance, and its transformer the cache."""
        plan, pipe = self.plan, self.pipe
        with self.backbone.attached():
            device = pipe._execution_device
            schedule = (plan.schedule.num_inference_steps, device, plan.schedule.sigmas, plan.schedule.timesteps)
            pipe.scheduler.set_rollout_timesteps(*schedule)
            pipe._num_timesteps = plan.count_steps(len(pipe.scheduler.timesteps))
            pipe._guidance_scale = self.guidance_scale
            pipe._attention_kwargs = plan.options.attention_kwargs
            pipe._interrupt = False
            yield

    def progress_bar(self) -> Any:
        """A context with a progress bar of the denoising steps to go, or with `None`."""
        return self.pipe.progress_bar(total=self.num_steps_left()) if self.shows_steps else nullcontext()

    def set_prompt(self, prompt: EncodedPrompt, is_cut: bool = False) -> None:
        """Change the prompt from the next denoising step on. A cut begins a new scene even if the prompt stays."""
        old, self.denoiser.prompt = self.denoiser.prompt, prompt
        self.backbone.prompt_changed()
        pairs = enumerate(zip(old.embeds, prompt.embeds))
        self.policies.prompt_changed([video for video, pair in pairs if is_cut or not torch.equal(*pair)])

    def change_prompt(self, prompt: Any, transition: str | None, blend_chunks: int) -> None:
        """Change the prompt from the next chunk on; arguments as in [`make_change`], `None` for the call's transition."""
        transition = self.plan.inputs.prompt_transition if transition is None else transition
        change = make_change(prompt, self.sizes.num_prompts, transition, blend_chunks)
        check_change(change, self.plan.layout, self.backbone.limits)
        check_lengths("prompt", change, self.plan.inputs.prompts, self.pipe.transformer.config.text_dim)
        self.schedule_change(self.index, change)

    @torch.no_grad()
    def schedule_change(self, index: int, change: PromptChange) -> None:
        """Encode the prompts of a change at chunk `index`."""
        rows = encode_change(self.pipe, self.plan, change, self.device)
        before = [chunk for chunk in self.changes if chunk < index]
        old = self.changes[max(before)][0] if before else self.denoiser.prompt.embeds
        new = torch.stack([kept if row is None else row.to(kept) for kept, row in zip(old, rows, strict=True)])
        for offset, embeds in enumerate(blended(old, new, change.blend_chunks)):
            again = offset == 0 or change.transition == "recache"
            self.changes[index + offset] = (embeds, change.transition if again else "keep")

    def follow_schedule(self, index: int) -> None:
        """Before chunk `index`: set the number of its steps, and a prompt that is scheduled for it, with its transition."""
        first, first_steps = self.sizes.num_given_chunks, self.plan.schedule.first_steps
        if first_steps is not None and index in (first, first + 1):
            num_steps = first_steps if index == first else self.plan.schedule.num_inference_steps
            self.pipe.scheduler.set_rollout_timesteps(num_steps, self.pipe._execution_device)
        if index not in self.changes:
            return
        embeds, transition = self.changes.pop(index)
        self.set_prompt(
            EncodedPrompt(embeds, self.denoiser.prompt.negative_embeds), is_cut=transition in ("cut", "shot")
        )
        if transition == "recache":
            self.denoiser.recache(index)
        elif transition == "shot":
            self.backbone.begin_shot()
        elif transition != "keep":
            self.backbone.flush(is_cut=transition == "cut")

    def state_dict(self) -> dict:
        """The run between two chunks, as plain values and tensors."""
        prompt, renoise = self.denoiser.prompt, self.denoiser.renoise
        self.denoiser.check_finite()  # of the last context pass
        return {
            "shape": self._shape(),
            "index": self.index,
            "in_flight": [[chunk.latents, chunk.step] for chunk in self.in_flight],
            "noise": [[index, noise.clone()] for index, noise in self.noise.chunks.items()],
            "num_drawn": self.noise.num_drawn,
            "given": self.given[self.index :],
            "changes": [[chunk, *change] for chunk, change in self.changes.items()],
            "renoise": [[*key, noise] for key, noise in renoise.drawn.items()],
            "prompt": [prompt.embeds, prompt.negative_embeds],
            "guidance_scale": self.guidance_scale,
            "generators": [generator.get_state() for generator in self._generators()],
            "policies": self.policies.state_dict(),
            "backbone": self.backbone.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from the state of a run of the same call.

        Raises:
            `ValueError`: the state is of a run of another call.
        """
        same_call, ours = "of a run of the same call", self._shape()
        check(state["shape"] == ours, "state", state["shape"], f"{same_call}, with {ours}")
        num_saved, num_known = len(state["generators"]), len(self._generators())
        check(num_saved == num_known, "state", num_saved, f"{same_call}, with {num_known} generators")
        self._check_place(state)
        self._check_prompts(state)
        self.policies.load_state_dict(state["policies"])
        self.policies.try_out(torch.ones(self.sizes.frame_shape, device=self.device)[:, :, None], BUILT_IN)
        self.index = state["index"]
        self.in_flight = tuple(InFlight(latents, step) for latents, step in state["in_flight"])
        self.noise.chunks, self.noise.num_drawn = dict(state["noise"]), state["num_drawn"]
        self.given[self.index :] = state["given"]
        self.changes = {chunk: (embeds, transition) for chunk, embeds, transition in state["changes"]}
        self.denoiser.renoise.drawn = {(chunk, step): noise for chunk, step, noise in state["renoise"]}
        self.denoiser.prompt = EncodedPrompt(*state["prompt"])
        self.guidance_scale = state["guidance_scale"]
        for generator, generator_state in zip(self._generators(), state["generators"]):
            generator.set_state(generator_state)
        num_rows = self.sizes.num_videos * len(self.denoiser.prompt.branches())
        self.backbone.load_state_dict(state["backbone"], num_rows)

    def _check_place(self, state: dict) -> None:
        """Refuse a chunk that the call does not have, and values that are not of its kinds."""
        same_call, index, sizes = "of a run of the same call", state["index"], self.sizes
        known = type(index) is int and index >= 0 and (index == 0 or sizes.has_chunk(index - 1))
        check(known, "state", index, f"{same_call}, with the index of one of its chunks")
        all_drawn = all(chunk in dict(state["noise"]) for chunk in range(index, state["num_drawn"]))
        check(all_drawn, "state", state["num_drawn"], f"{same_call}, with the noise of each chunk that was drawn")
        num_given, num_in_flight = len(self.given[index:]), self.plan.schedule.num_in_flight
        check(
            len(state["given"]) == num_given,
            "state",
            len(state["given"]),
            f"{same_call}, with {num_given} given chunks",
        )
        for offset, (latents, step) in enumerate(state["in_flight"]):
            check_int("state", step, 0, ", the step of a chunk in flight", maximum=num_in_flight)
            self.check_chunk("a chunk in flight", index + offset, latents)
        for name, chunks in (("noise", state["noise"]), ("a given chunk", enumerate(state["given"], index))):
            for chunk, latents in chunks:
                self.check_chunk(name, chunk, latents)
        for chunk, _, noise in state["renoise"]:
            self.check_chunk("noise between steps", chunk, noise)
        check_number("state", state["guidance_scale"], lambda _: True, f"{same_call}, with a finite guidance scale")

    def check_chunk(self, name: str, index: int, latents: torch.Tensor) -> None:
        """Refuse latents of a saved run that are not of chunk `index`."""
        num_videos, channels, *size = self.sizes.frame_shape
        check_saved(name, latents, (num_videos, channels, self.sizes.chunk_size(index), *size))

    def _check_prompts(self, state: dict) -> None:
        """Refuse embeddings of a saved run that are not like those of the call."""
        embeds, negative_embeds = self.denoiser.prompt.embeds, self.denoiser.prompt.negative_embeds
        for saved in (state["prompt"][0], *(each for _, each, _ in state["changes"])):
            check_saved("a prompt", saved, embeds.shape)
        if negative_embeds is None:
            check(
                state["prompt"][1] is None, "state", state["prompt"][1], "of a run of the same call, without guidance"
            )
        else:
            check_saved("a negative prompt", state["prompt"][1], negative_embeds.shape)

    def _shape(self) -> list:
        """What all runs of a call have in common."""
        return [list(self.sizes.frame_shape), list(self.sizes.chunk_partition), self.sizes.is_endless]

    def _generators(self) -> list[torch.Generator]:
        """All generators that the run draws from."""
        given = self.generator if isinstance(self.generator, list) else [self.generator]
        return [*given, *(self.denoiser.solver_generators or [])]

    def _call_back(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Call `callback_on_step_end`, set the prompt that it changed, and return the latents to continue with."""
        callbacks, prompt, name = self.plan.callbacks, self.denoiser.prompt, "callback_on_step_end"
        before = {
            "latents": latents,
            "prompt_embeds": prompt.embeds,
            "negative_prompt_embeds": prompt.negative_embeds,
        }
        after = {key: None if tensor is None else tensor.clone() for key, tensor in before.items()}
        wanted = {key: after[key] for key in callbacks.step_tensors}
        outputs = callbacks.on_step_end(self.pipe, step, timestep, wanted)
        check(isinstance(outputs, dict), name, outputs, "a function that returns a dict of tensors", TypeError)
        check(set(outputs) <= set(before), name, list(outputs), f"a function that returns some of {list(before)}")
        after.update({key: each.detach() if isinstance(each, torch.Tensor) else each for key, each in outputs.items()})
        for key, tensor in before.items():
            if tensor is None:
                check(after[key] is None, f"{name}: {key}", after[key], "None in a call without guidance")
                continue
            check_tensor(f"{name}: {key}", after[key], tensor.ndim, f"like the {key} that it was given")
            check(after[key].shape == tensor.shape, f"{name}: {key}", after[key], f"of shape {tuple(tensor.shape)}")
        embeds, negative_embeds = after["prompt_embeds"].to(prompt.embeds), after["negative_prompt_embeds"]
        same_negative = negative_embeds is None or torch.equal(negative_embeds, prompt.negative_embeds)
        if not (torch.equal(embeds, prompt.embeds) and same_negative):
            self.set_prompt(EncodedPrompt(embeds, negative_embeds))
        return after["latents"]
