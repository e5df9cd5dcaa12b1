# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How a stream starts: from a call, or from the folder that an earlier stream saved to."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

from ..tokentrim_backbones.attention import check_free
from ..tokentrim_checks import check, check_int
from ..tokentrim_files.checkpoint import SETTINGS
from ..tokentrim_files.run_state import (
    check_same,
    check_weights,
    find_state,
    fingerprint,
    has_state,
    keep_method,
    lock_state,
    recall,
    record_call,
    settings_of,
    whole_state,
)
from ..tokentrim_frames.decode import FrameDecoder, make_decoder
from ..tokentrim_policies.registry import DEFAULT_METHOD
from .arguments import plan_rollout, read_call
from .encode import encode_given, encode_prompts
from .history import History
from .host import Pipeline
from .plan import RolloutPlan
from .run import Rollout
from .stream import Stream


def start_stream(
    pipe: Pipeline,
    call: dict,
    preview_vae: Any,
    state_dir: str | os.PathLike | None,
    save_every: int,
    keep_states: int,
) -> Stream:
    """
    A new stream.

    Args:
        pipe ([`Pipeline`]): the pipeline.
        call (`dict`): all arguments of its call.
        preview_vae, state_dir, save_every, keep_states: as in `stream` of the pipeline.

    Raises:
        `TypeError`, `ValueError`: an argument is invalid, or `state_dir` holds a state.
    """
    call = read_call(call)
    check_int("save_every", save_every, 1)
    check_int("keep_states", keep_states, 0)
    plan = plan_rollout(pipe, call, may_be_endless=True)
    with ExitStack() as held:
        if state_dir is not None:
            os.makedirs(state_dir, exist_ok=True)
            held.enter_context(lock_state(state_dir))
            valid = "a folder without a state: `pipe.resume(state_dir)` continues a saved run"
            check(not has_state(state_dir), "state_dir", str(state_dir), valid)
        run, decoder = pipe.begin(plan), _make_decoder(pipe, plan, preview_vae)
        history = History(state_dir, save_every, keep_states, _origin(pipe, record_call(call), decoder))
        return Stream(pipe, run, decoder, history, held=held.pop_all())


def begin_run(pipe: Pipeline, plan: RolloutPlan) -> Rollout:
    """A new run of a planned call: prompts and frames to continue are encoded, nothing is denoised yet."""
    check_free(pipe.transformer)
    device = pipe._execution_device
    prompt, given = encode_prompts(pipe, plan, device), encode_given(pipe, plan, device)
    run = Rollout(pipe, plan, prompt, device, given)
    for index, change in plan.inputs.prompt_changes.items():
        run.schedule_change(index, change)
    return run


def resume_stream(pipe: Pipeline, state_dir: str | os.PathLike, preview_vae: Any, objects: dict) -> Stream:
    """
    The rest of a stream that was saved.

    Args:
        pipe ([`Pipeline`]): the pipeline that continues it.
        state_dir (`str` or `os.PathLike`), preview_vae: those of the stream.
        objects (`dict`): arguments of its call that a state cannot hold.

    Raises:
        `ValueError`: no state is whole, or settings, weights or arguments are not those of the stream.
    """
    with ExitStack() as held:
        held.enter_context(lock_state(state_dir))
        path, state = find_state(state_dir)
        with whole_state(path):
            keep_method(state, DEFAULT_METHOD)
            call = recall(state["call"], objects)
            given = [name for name in SETTINGS if call.get(name) is not None]
            check_same(state["settings"], settings_of(pipe), given)
            models = {"transformer": pipe.transformer, "vae": pipe.vae, "preview_vae": preview_vae}
            check_weights(state["weights"], models)
        with whole_state(path, set(call) - set(objects)):
            plan = plan_rollout(pipe, call, may_be_endless=True)
        run = pipe.begin(plan)
        with whole_state(path):
            run.load_state_dict(state["run"])
            decoder = _make_decoder(pipe, plan, preview_vae)
            if decoder is not None:
                decoder.load_state_dict(state["decoder"])
                decoder.try_out(run.sizes.frame_shape, run.device)
            if state["undecoded"] is not None:
                run.check_chunk("the chunk that is not decoded", *state["undecoded"][:2])
            keep_states = state.get("keep_states", 0)  # older states do not say it
            origin = _origin(pipe, state["call"], decoder)
            history = History(state_dir, state["save_every"], keep_states, origin)
            return Stream(pipe, run, decoder, history, state["files"], state["undecoded"], held.pop_all())


def _make_decoder(pipe: Pipeline, plan: RolloutPlan, preview_vae: Any) -> FrameDecoder | None:
    return make_decoder(pipe.vae, preview_vae, plan.sizes.temporal_factor) if plan.decodes else None


def _origin(pipe: Pipeline, call: dict, decoder: FrameDecoder | None) -> Callable[[], dict]:
    """What decides a run beside its state: the recorded call, the checkpoint's settings, and the models' fingerprints."""
    models = {"transformer": pipe.transformer}
    if decoder is not None:
        models["vae" if decoder.vae is pipe.vae else "preview_vae"] = decoder.vae
    weights = cache(lambda: {name: fingerprint(model) for name, model in models.items()})
    return lambda: {"call": call, "weights": weights(), "settings": settings_of(pipe)}
