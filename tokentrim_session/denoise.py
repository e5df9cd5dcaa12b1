# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""From noise to the latents of a chunk, on one context: attempts, and what they need of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..tokentrim_checks import check
from ..tokentrim_views.layout import Pass
from .noise import Noise, Renoise


@dataclass(frozen=True)
class Prompt:
    """Text embeddings, (B, text, dim), and the negative ones where there is classifier-free guidance."""

    embeds: torch.Tensor
    negative_embeds: torch.Tensor | None = None

    def branches(self, videos: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Embeddings of each guidance branch, the unconditional one first, for some videos or all."""
        both = [embeds for embeds in (self.negative_embeds, self.embeds) if embeds is not None]
        return both if videos is None else [embeds[videos] for embeds in both]


@dataclass(frozen=True)
class InFlight:
    """A chunk on its way: latents (B, C, frames, H, W) after `step` denoising steps."""

    latents: torch.Tensor
    step: int = 0

    def rows(self, videos: Sequence[int] | None) -> "InFlight":
        return self if videos is None else InFlight(self.latents[videos], self.step)

    def replaced(self, videos: Sequence[int], other: "InFlight") -> "InFlight":
        """With the rows of some videos from `other`, which has these alone."""
        latents = self.latents.clone()
        latents[videos] = other.latents
        return InFlight(latents, other.step)


@dataclass(frozen=True)
class Draft:
    """An attempt at a chunk.

    Args:
        index (`int`): the chunk's.
        before (`tuple[InFlight, ...]`): the chunks in flight before the attempt, this one first where it was among them.
        after (`tuple[InFlight, ...]`): the same after it.
        judged (`torch.Tensor`): what policies review, (B, C, frames, H, W).
        first_flow (`torch.Tensor`, *optional*): where that is the x0 prediction of the first step: the flow behind it.
    """

    index: int
    before: tuple[InFlight, ...]
    after: tuple[InFlight, ...]
    judged: torch.Tensor
    first_flow: torch.Tensor | None = None


class Denoiser:
    """Denoises chunks behind the cached past, and commits them to it.

    Self Forcing has one chunk in flight, which takes all its steps; Rolling Forcing as many as there are steps, each a
    step behind the chunk before it.

    Args:
        pipe: the pipeline; its scheduler, `guidance_scale` and `interrupt`, which a callback may change in any step.
        backbone ([`WanBackbone`] or [`FARBackbone`]): the model and its past.
        plan ([`RolloutPlan`]): how many chunks are in flight, the method's hooks and its drift signal.
        prompt ([`Prompt`]): what is asked for.
        noise ([`Noise`]): of every chunk.
        renoise ([`Renoise`]): see there.
        solver_generators (`list[torch.Generator]`, *optional*): for schedulers that draw inside a step.
    """

    def __init__(
        self,
        pipe: Any,
        backbone: Any,
        plan: Any,
        prompt: Prompt,
        noise: Noise,
        renoise: Renoise,
        solver_generators: list[torch.Generator] | None = None,
    ):
        self.pipe = pipe
        self.scheduler = pipe.scheduler
        self.backbone = backbone
        self.prompt = prompt
        self.noise = noise
        self.renoise = renoise
        self.solver_generators = solver_generators
        self.plan = plan
        self.num_in_flight = plan.num_in_flight
        self.first_chunk = plan.num_given_chunks
        self.hooks = plan.method.hooks
        self.by_first_step = plan.method.drift_signal == "first_step"
        self.attention_kwargs = plan.call["attention_kwargs"]
        self.on_step: Callable | None = None  # `on_step(step, timestep, latents)` gives the latents to go on with
        self.progress: Any = None  # a bar of denoising steps, while the rollout runs
        self._outcomes: list[tuple[str, torch.Tensor]] = []  # where the model was asked, and whether all was finite

    # 1. A chunk

    def draft(self, index: int, in_flight: tuple[InFlight, ...]) -> Draft:
        """The first attempt at a chunk."""
        self.scheduler.begin_chunk(self.solver_generators)
        if not self.by_first_step:
            after = self._denoise(index, in_flight)
            self.check_finite()
            return Draft(index, in_flight, after, after[0].latents)
        (chunk,) = self._guided(index, [InFlight(self.noise[index])])
        flow = self._predict_flow(index, [chunk])
        x0 = self.scheduler.predict_original_sample(flow, chunk.latents)
        self.check_finite()
        return Draft(index, in_flight, (chunk,), x0, flow)

    def redraft(self, draft: Draft, videos: list[int]) -> Draft:
        """The draft with some videos generated again from the same noise, on the context as it is now."""
        if self.pipe.interrupt:
            return draft
        with self.backbone.cache.only(videos):
            if self.by_first_step:
                noise, flow, judged = draft.after[0].latents[videos], draft.first_flow.clone(), draft.judged.clone()
                flow[videos] = self._predict_flow(draft.index, [InFlight(noise)], videos)
                judged[videos] = self.scheduler.predict_original_sample(flow[videos], noise)
                self.check_finite()
                return Draft(draft.index, draft.before, draft.after, judged, flow)
            if self.progress is not None and self.progress.total is not None:
                self.progress.total += len(self.scheduler.timesteps) - (draft.before[0].step if draft.before else 0)
            again = self._denoise(draft.index, draft.before, videos)
        self.check_finite()
        after = tuple(kept.replaced(videos, new) for kept, new in zip(draft.after, again))
        return Draft(draft.index, draft.before, after, after[0].latents)

    def finish(self, draft: Draft) -> tuple[torch.Tensor, tuple[InFlight, ...]]:
        """From the accepted draft to the finished chunk, (B, C, frames, H, W), and the chunks still in flight."""
        after = draft.after
        if self.by_first_step:
            after = self._denoise(draft.index, after, first_flow=draft.first_flow)
            self.check_finite()
        finished, *in_flight = after
        return finished.latents, tuple(in_flight)

    def commit(self, index: int, context: torch.Tensor, entered: Sequence[bool]) -> None:
        """The pass that writes a chunk's latents, (B, C, frames, H, W), into the past; of videos that have not
        `entered`, nothing stays."""
        outcome = self.backbone.commit(*self._branches(context), self.attention_kwargs)
        self._note(outcome, index, "the context pass")
        cache, rejected = self.backbone.cache, [video for video, enters in enumerate(entered) if not enters]
        if rejected:
            tokens = dict.fromkeys(rejected, range(cache.tokens_per_frame))
            self.backbone.evict(tokens, since_frame=cache.next_frame - context.shape[2])

    def recache(self) -> None:
        """Encode the window again under the prompt as it is now."""
        self.backbone.recache(torch.cat(self.prompt.branches()), self.attention_kwargs)

    def check_finite(self) -> None:
        """Refuse what is not finite, of all that the model said since the last time: one transfer for many steps."""
        outcomes, self._outcomes = self._outcomes, []
        finite = torch.stack([each for _, each in outcomes]).tolist() if outcomes else []
        for (place, _), is_finite in zip(outcomes, finite):
            if not is_finite:
                raise RuntimeError(f"The transformer's output is not finite (NaN or Inf) in {place}.")

    # 2. Its steps

    def _denoise(
        self,
        index: int,
        in_flight: Sequence[InFlight],
        videos: list[int] | None = None,
        first_flow: torch.Tensor | None = None,
    ) -> tuple[InFlight, ...]:
        """Denoise all chunks in flight together, step by step, until chunk `index`, their first, is finished."""
        self.scheduler.rewind(videos)
        timesteps, flow = self.scheduler.timesteps, first_flow
        chunks = [chunk.rows(videos) for chunk in in_flight]
        while not chunks or chunks[0].step < len(timesteps):
            if len(chunks) < self.num_in_flight and self.plan.has_chunk(index + len(chunks)):
                chunks.append(InFlight(self.noise[index + len(chunks)]).rows(videos))
            if self.pipe.interrupt:
                break
            if flow is None:
                chunks = self._guided(index, chunks, videos)
                flow = self._predict_flow(index, chunks, videos)
            sizes = [chunk.latents.shape[2] for chunk in chunks]
            step, flows, flow = chunks[0].step, flow.split(sizes, dim=2), None
            pairs = enumerate(zip(chunks, flows), start=index)
            chunks = [self._step(number, chunk, chunk_flow, videos) for number, (chunk, chunk_flow) in pairs]
            if self.on_step is not None:
                latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
                latents = self.on_step(step, timesteps[step], latents).split(sizes, dim=2)
                chunks = [InFlight(changed, chunk.step) for chunk, changed in zip(chunks, latents)]
            if self.progress is not None:
                self.progress.update()
        return tuple(chunks)

    def _step(self, index: int, chunk: InFlight, flow: torch.Tensor, videos: list[int] | None) -> InFlight:
        """One scheduler step of one chunk in flight."""
        timesteps = self.scheduler.timesteps
        if self.num_in_flight > 1:
            self.scheduler.seek(chunk.step)
        eps = None
        if self.scheduler.renoises and chunk.step + 1 < len(timesteps):
            eps = self.renoise(index, chunk.step, chunk.latents.shape[2])
            eps = eps if videos is None else eps[videos]
        latents, _ = self.scheduler.step(
            flow,
            timesteps[chunk.step],
            chunk.latents,
            noise=eps,
            context_version=self.backbone.cache.version,
            return_dict=False,
        )
        return InFlight(latents, chunk.step + 1)

    def _guided(self, index: int, chunks: list[InFlight], videos: list[int] | None = None) -> list[InFlight]:
        """The chunks in flight, of which `index` is the first, as hooks change them before their step."""
        chunks, sizes, num_steps = (
            list(chunks),
            [chunk.latents.shape[2] for chunk in chunks],
            len(self.scheduler.timesteps),
        )
        for offset, chunk in enumerate(chunks):
            hooks = [
                hook for hook in self.hooks if hook.guides(index + offset - self.first_chunk, chunk.step, num_steps)
            ]
            if hooks and self.num_in_flight > 1:
                self.scheduler.seek(chunk.step)

            def predict_x0(latents, offset=offset, step=chunk.step):
                guided = [*chunks[:offset], InFlight(latents, step), *chunks[offset + 1 :]]
                flow = self._predict_flow(index, guided, videos).split(sizes, dim=2)[offset]
                self.check_finite()  # a hook looks at each prediction
                return self.scheduler.predict_original_sample(flow, latents)

            for hook in hooks:
                latents = hook(chunks[offset].latents, predict_x0, self.backbone.transformer).detach()
                chunks[offset] = InFlight(latents, chunk.step)
        return chunks

    # 3. The model

    def _predict_flow(self, index: int, chunks: Sequence[InFlight], videos: list[int] | None = None) -> torch.Tensor:
        """The transformer's flow prediction in fp32, guided where asked, (B or len(videos), C, frames, H, W)."""
        sizes = [chunk.latents.shape[2] for chunk in chunks]
        levels = F.pad(self.scheduler.timesteps, (0, 1))
        guided = self._is_guided()
        latents, text = self._branches(torch.cat([chunk.latents for chunk in chunks], dim=2), videos, guided)
        flow = self.backbone.predict_flow(
            latents,
            sizes,
            torch.stack([levels[chunk.step] for chunk in chunks]),
            torch.stack([levels[chunk.step + 1] for chunk in chunks]),
            text,
            self.attention_kwargs,
            Pass("denoise", chunks[0].step),
        ).float()
        self._note(flow, index, f"step {chunks[0].step}")
        if not guided:
            return flow
        unconditional, conditional = flow.chunk(2)
        return unconditional + self.pipe.guidance_scale * (conditional - unconditional)

    def _is_guided(self) -> bool:
        """Whether there is classifier-free guidance in the step at hand, as the pipeline has it now."""
        guided, scale = self.pipe.do_classifier_free_guidance, self.pipe.guidance_scale
        known = self.prompt.negative_embeds is not None
        check(known or not guided, "guidance_scale", scale, "<= 1 in a callback of a call that began without guidance")
        return guided

    def _branches(
        self, latents: torch.Tensor, videos: list[int] | None = None, guided: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of latents and of text: with guidance the unconditional ones first."""
        embeds = self.prompt.branches(videos)[0 if guided else -1 :]
        return torch.cat([latents] * len(embeds)), torch.cat(embeds)

    def _note(self, outcome: torch.Tensor, index: int, place: str) -> None:
        """Whether an outcome is finite, for the next `check_finite`."""
        self._outcomes.append((f"chunk {index}, {place}", torch.isfinite(outcome).all()))
