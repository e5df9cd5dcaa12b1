# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How a stream starts: from a call, or from the folder that an earlier stream saved to."""

import os
from contextlib import ExitStack
from typing import Any

from ..tokentrim_checks import check, check_int
from ..tokentrim_files.checkpoint import SETTINGS
from ..tokentrim_files.run_state import (
    check_same,
    check_weights,
    has_state,
    keep_method,
    load_state,
    lock_state,
    recall,
    record_call,
    settings_of,
    whole_state,
)
from ..tokentrim_frames.decode import FrameDecoder, make_decoder
from ..tokentrim_policies.registry import DEFAULT_METHOD
from .arguments import plan_rollout, read_call
from .host import Pipeline
from .plan import RolloutPlan
from .stream import Stream


def start_stream(
    pipe: Pipeline, call: dict, preview_vae: Any, state_dir: str | os.PathLike | None, save_every: int
) -> Stream:
    """
    A new stream.

    Args:
        pipe ([`Pipeline`]): the pipeline.
        call (`dict`): all arguments of its call.
        preview_vae, state_dir, save_every: as in `stream` of the pipeline.

    Raises:
        `TypeError`, `ValueError`: an argument is invalid, or `state_dir` holds a state.
    """
    call = read_call(call)
    check_int("save_every", save_every, 1)
    plan = plan_rollout(pipe, call, may_be_endless=True)
    with ExitStack() as held:
        if state_dir is not None:
            os.makedirs(state_dir, exist_ok=True)
            held.enter_context(lock_state(state_dir))
            valid = "a folder without a state: `pipe.resume(state_dir)` continues a saved run"
            check(not has_state(state_dir), "state_dir", str(state_dir), valid)
        run, decoder = pipe.begin(plan), _make_decoder(pipe, plan, preview_vae)
        return Stream(pipe, run, decoder, state_dir, save_every, record_call(call), held=held.pop_all())


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
        state = load_state(state_dir)
        with whole_state(state_dir):
            keep_method(state, DEFAULT_METHOD)
            call = recall(state["call"], objects)
            given = [name for name in SETTINGS if call.get(name) is not None]
            check_same(state["settings"], settings_of(pipe), given)
            models = {"transformer": pipe.transformer, "vae": pipe.vae, "preview_vae": preview_vae}
            check_weights(state["weights"], models)
            plan = plan_rollout(pipe, call, may_be_endless=True)
        run = pipe.begin(plan)
        with whole_state(state_dir):
            run.load_state_dict(state["run"])
            decoder = _make_decoder(pipe, plan, preview_vae)
            if decoder is not None:
                decoder.load_state_dict(state["decoder"])
            saved = [state[name] for name in ("save_every", "call", "files", "undecoded")]
            return Stream(pipe, run, decoder, state_dir, *saved, held=held.pop_all())


def _make_decoder(pipe: Pipeline, plan: RolloutPlan, preview_vae: Any) -> FrameDecoder | None:
    return make_decoder(pipe.vae, preview_vae, plan.sizes.temporal_factor) if plan.decodes else None
