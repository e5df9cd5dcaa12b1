# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""From noise to the latents of a chunk, on one context."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..tokentrim_backbones.backbone import Backbone
from ..tokentrim_checks import check
from ..tokentrim_views.view import Pass
from .draft import Draft, InFlight, Rows
from .host import Pipeline
from .noise import Noise, Renoise
from .plan import RolloutPlan
from .prompts import EncodedPrompt


class Denoiser:
    """Denoises chunks behind the cached past, and commits them to it.

    Self Forcing has one chunk in flight, which takes all its steps. Rolling Forcing has as many as there are steps,
    each a step behind the chunk before it.

    Args:
        pipe ([`Pipeline`]): its scheduler, `guidance_scale` and `interrupt`, which a callback may change in any step.
        backbone ([`Backbone`]): the model and its past.
        plan ([`RolloutPlan`]): how many chunks are in flight, the method's hooks and its drift signal.
        prompt ([`EncodedPrompt`]): the prompt at hand.
        noise ([`Noise`]): initial noise of every chunk.
        renoise ([`Renoise`]): noise between steps.
        solver_generators (`list[torch.Generator]`, *optional*): for schedulers that draw inside a step.
    """

    def __init__(
        self,
        pipe: Pipeline,
        backbone: Backbone,
        plan: RolloutPlan,
        prompt: EncodedPrompt,
        noise: Noise,
        renoise: Renoise,
        solver_generators: list[torch.Generator] | None = None,
    ):
        self.pipe = pipe
        self.scheduler = pipe.scheduler
        self.backbone = backbone
        self.plan = plan
        self.prompt = prompt
        self.noise = noise
        self.renoise = renoise
        self.solver_generators = solver_generators
        self.num_in_flight = plan.schedule.num_in_flight
        self.by_first_step = plan.method.drift_signal == "first_step"
        self.on_step: Callable | None = None  # `on_step(step, timestep, latents)` returns the latents to continue with
        self.progress: Any = None  # a bar of denoising steps, while the rollout runs
        self._rows = Rows()  # the videos of the attempt at hand
        self._finite: list[tuple[str, torch.Tensor]] = []  # passes since the last check: name, and whether finite

    # 1. A chunk

    def draft(self, index: int, in_flight: tuple[InFlight, ...]) -> Draft:
        """The first attempt at a chunk."""
        self.scheduler.begin_chunk(self.solver_generators)
        if not self.by_first_step:
            after = self._denoise(index, in_flight)
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
        with self._only(videos) as rows:
            if self.by_first_step:
                noise = InFlight(rows.of(draft.after[0].latents))
                flow = self._predict_flow(draft.index, [noise])
                x0 = self.scheduler.predict_original_sample(flow, noise.latents)
                self.check_finite()
                judged, flow = rows.within(draft.judged, x0), rows.within(draft.first_flow, flow)
                return replace(draft, judged=judged, first_flow=flow)
            if self.progress is not None and self.progress.total is not None:
                self.progress.total += len(self.scheduler.timesteps) - (draft.before[0].step if draft.before else 0)
            before = [replace(chunk, latents=rows.of(chunk.latents)) for chunk in draft.before]
            again = self._denoise(draft.index, before)
        after = tuple(
            replace(new, latents=rows.within(old.latents, new.latents)) for old, new in zip(draft.after, again)
        )
        return replace(draft, after=after, judged=after[0].latents)

    def finish(self, draft: Draft) -> tuple[torch.Tensor, tuple[InFlight, ...]]:
        """From the accepted draft to the finished chunk, (B, C, frames, H, W), and the chunks still in flight."""
        after = draft.after
        if self.by_first_step:
            after = self._denoise(draft.index, after, draft.first_flow)
        finished, *in_flight = after
        return finished.latents, tuple(in_flight)

    def commit(self, index: int, context: torch.Tensor, entered: Sequence[bool]) -> None:
        """Write a chunk's latents, (B, C, frames, H, W), into the past of the videos that have `entered`."""
        is_given = index < self.plan.sizes.num_given_chunks  # those are clean
        timestep = 0.0 if is_given else self.plan.schedule.context_noise
        finite = self.backbone.commit(*self._branches(context), entered, timestep)
        self._finite.append((f"chunk {index}, the context pass", finite))

    def recache(self, index: int) -> None:
        """Before chunk `index`: encode the window again under the prompt at hand."""
        text, timestep = torch.cat(self.prompt.branches()), self.plan.schedule.context_noise
        finite = self.backbone.recache(text, timestep)
        if finite is not None:
            self._finite.append((f"chunk {index}, the pass that encodes the context again", finite))

    def check_finite(self) -> None:
        """
        Check all passes since the last check: one device transfer for many steps.

        Raises:
            `RuntimeError`: the output of a pass was NaN or Inf; the message names the first such pass.
        """
        passes, self._finite = self._finite, []
        finite = torch.stack([each for _, each in passes]).tolist() if passes else []
        for (name, _), is_finite in zip(passes, finite):
            if not is_finite:
                raise RuntimeError(f"The transformer's output is not finite (NaN or Inf) in {name}.")

    # 2. Its steps

    @contextmanager
    def _only(self, videos: list[int]) -> Iterator[Rows]:
        """A context in which noise, prompt, generators and the past are those of some videos."""
        self._rows = Rows(videos)
        try:
            with self.backbone.only(videos):
                yield self._rows
        finally:
            self._rows = Rows()

    def _denoise(
        self, index: int, in_flight: Sequence[InFlight], first_flow: torch.Tensor | None = None
    ) -> tuple[InFlight, ...]:
        """Denoise all chunks in flight together, step by step, until chunk `index`, their first, is finished."""
        self.scheduler.rewind(self._rows.videos)
        timesteps, chunks, flow = self.scheduler.timesteps, list(in_flight), first_flow
        while not chunks or chunks[0].step < len(timesteps):
            newest = index + len(chunks)
            if len(chunks) < self.num_in_flight and self.plan.sizes.has_chunk(newest):
                chunks.append(InFlight(self._rows.of(self.noise[newest])))
            if self.pipe.interrupt:
                break
            if flow is None:
                chunks = self._guided(index, chunks)
                flow = self._predict_flow(index, chunks)
            step, sizes = chunks[0].step, [chunk.num_frames for chunk in chunks]
            flows, flow = flow.split(sizes, dim=2), None
            chunks = [self._step(index + offset, *pair) for offset, pair in enumerate(zip(chunks, flows))]
            if self.on_step is not None:
                self.check_finite()  # before the callback sees the latents
                latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
                latents = self.on_step(step, timesteps[step], latents).split(sizes, dim=2)
                chunks = [InFlight(changed, chunk.step) for chunk, changed in zip(chunks, latents)]
            if self.progress is not None:
                self.progress.update()
        self.check_finite()
        return tuple(chunks)

    def _step(self, index: int, chunk: InFlight, flow: torch.Tensor) -> InFlight:
        """One scheduler step of one chunk in flight."""
        timesteps, eps = self.scheduler.timesteps, None
        if self.num_in_flight > 1:
            self.scheduler.seek(chunk.step)
        if self.scheduler.renoises and chunk.step + 1 < len(timesteps):
            eps = self._rows.of(self.renoise(index, chunk.step, chunk.num_frames))
        latents, _ = self.scheduler.step(
            flow,
            timesteps[chunk.step],
            chunk.latents,
            noise=eps,
            context_version=self.backbone.context_version,
            return_dict=False,
        )
        return InFlight(latents, chunk.step + 1)

    def _guided(self, index: int, chunks: Sequence[InFlight]) -> list[InFlight]:
        """The chunks in flight, of which `index` is the first, as hooks change them before their step."""
        chunks, num_steps, first = list(chunks), len(self.scheduler.timesteps), self.plan.sizes.num_given_chunks
        sizes = [chunk.num_frames for chunk in chunks]
        for offset, chunk in enumerate(chunks):
            number = index + offset - first  # hooks count generated chunks
            hooks = [hook for hook in self.plan.method.hooks if hook.guides(number, chunk.step, num_steps)]
            if hooks and self.num_in_flight > 1:
                self.scheduler.seek(chunk.step)

            def predict_x0(latents, offset=offset, step=chunk.step):
                guided = [*chunks[:offset], InFlight(latents, step), *chunks[offset + 1 :]]
                flow = self._predict_flow(index, guided).split(sizes, dim=2)[offset]
                self.check_finite()  # before a hook takes a gradient of it
                return self.scheduler.predict_original_sample(flow, latents)

            for hook in hooks:
                latents = hook(chunks[offset].latents, predict_x0, self.backbone.transformer).detach()
                chunks[offset] = InFlight(latents, chunk.step)
        return chunks

    # 3. The model

    def _predict_flow(self, index: int, chunks: Sequence[InFlight]) -> torch.Tensor:
        """The transformer's flow prediction in fp32, guided where asked, (videos at hand, C, frames, H, W)."""
        levels = F.pad(self.scheduler.timesteps, (0, 1))
        guided = self._is_guided()
        latents, text = self._branches(torch.cat([chunk.latents for chunk in chunks], dim=2), guided)
        sizes = tuple(chunk.num_frames for chunk in chunks)
        flow = self.backbone.predict_flow(
            latents,
            sizes,
            torch.stack([levels[chunk.step] for chunk in chunks]),
            torch.stack([levels[chunk.step + 1] for chunk in chunks]),
            text,
            Pass("denoise", chunks[0].step, chunk_sizes=sizes if self.plan.schedule.is_one_way else ()),
        ).float()
        self._finite.append((f"chunk {index}, step {chunks[0].step}", torch.isfinite(flow).all()))
        if not guided:
            return flow
        unconditional, conditional = flow.chunk(2)
        return unconditional + self.pipe.guidance_scale * (conditional - unconditional)

    def _is_guided(self) -> bool:
        """Whether the step at hand has classifier-free guidance, as the pipeline says now."""
        guided, scale = self.pipe.do_classifier_free_guidance, self.pipe.guidance_scale
        known = self.prompt.negative_embeds is not None
        check(known or not guided, "guidance_scale", scale, "<= 1 in a callback of a call that began without guidance")
        return guided

    def _branches(self, latents: torch.Tensor, guided: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of latents and of text: with guidance the unconditional ones first."""
        embeds = [self._rows.of(branch) for branch in self.prompt.branches()[0 if guided else -1 :]]
        return torch.cat([latents] * len(embeds)), torch.cat(embeds)
