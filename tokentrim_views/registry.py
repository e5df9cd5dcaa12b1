# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The layouts that a user can name; turns a name, a dict or an object into a layout."""

import inspect
from functools import partial
from typing import Any

from ..tokentrim_checks import check, check_choice, check_int, check_list, check_settings
from .averages import EmaSink, MemRoPE
from .deep_sink import deep_sink
from .layout import Layout, WindowLayout
from .tether import Tame, Tether
from .windows import AttentionBias, CommitForcing, InfinityRope, LongLive, RollingSink


LAYOUTS = {
    "window": WindowLayout,
    "infinity_rope": InfinityRope,
    "longlive": LongLive,
    "commit_forcing": CommitForcing,
    "recency": partial(CommitForcing, commit_window_size=None, recency_bias=True),
    "rolling_sink": RollingSink,
    "deep_sink": deep_sink,
    "memrope": MemRoPE,
    "ema_sink": EmaSink,
    "tether": Tether,
    "tame": Tame,
    "attention_bias": AttentionBias,
}


REQUIRED = ("keep", "view")
OPTIONAL = ("sink", "flush", "recache", "sized", "check", "before_chunk", "before_commit")
ATTRIBUTES = ("window_size", "num_sink_frames", "one_chunk_a_pass", "transitions")


class CompletedLayout(Layout):
    """A user's object with `keep` and `view`; what it lacks is as in [`Layout`].

    Args:
        layout: the object.
    """

    transitions = ("keep",)  # the others would change a context of which only the object knows how it is made

    def __init__(self, layout: Any):
        known = {name: getattr(layout, name, None) for name in (*REQUIRED, *OPTIONAL, *ATTRIBUTES)}
        vars(self).update({name: value for name, value in known.items() if value is not None})


def as_layout(layout: Any) -> Layout:
    """
    A user's object as a layout that has everything, so that nothing asks what it has after that.

    Args:
        layout: a [`Layout`], or an object with `keep` and `view`.

    Returns:
        [`Layout`]: the object itself if it is one; errors name its class in any case.

    Raises:
        `TypeError`, `ValueError`: it lacks `keep` or `view`, or an attribute is invalid.
    """
    has_verbs = not isinstance(layout, type) and all(callable(getattr(layout, verb, None)) for verb in REQUIRED)
    valid = f"one of {list(LAYOUTS)}, a dict of one of them with its settings, or an object with `keep` and `view`"
    check(has_verbs, "layout", layout, valid, TypeError)
    if not isinstance(layout, Layout):
        named = type(type(layout).__name__, (CompletedLayout,), {})
        layout = named(layout)
    name = type(layout).__name__
    if layout.window_size is not None:
        check_int(f"{name}.window_size", layout.window_size, 1, ", or None")
    check_int(f"{name}.num_sink_frames", layout.num_sink_frames, 0)
    check_list(f"{name}.transitions", layout.transitions, str, "a tuple of names of transitions")
    return layout


def make_layout(layout: Any) -> Layout:
    """
    The layout of a call.

    Args:
        layout (`str`, `dict` or [`Layout`]): a name of `LAYOUTS`, a dict of one name with its settings, or an object with
            `keep` and `view`.

    Returns:
        [`Layout`]: see [`as_layout`].

    Raises:
        `TypeError`, `ValueError`: an unknown layout or setting, or an object without the verbs.
    """
    if isinstance(layout, str):
        layout = {layout: {}}
    if not isinstance(layout, dict):
        return as_layout(layout)
    check(len(layout) == 1, "layout", layout, "a dict of one layout with its settings")
    ((name, settings),) = layout.items()
    check_choice("layout", name, tuple(LAYOUTS))
    kind = LAYOUTS[name]
    check_settings(f"layout[{name!r}]", settings, list(inspect.signature(kind).parameters))
    return kind(**settings)
