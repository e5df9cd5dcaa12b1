# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The layouts that a user can name; turns a name, a dict or an object into a layout."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from ..tokentrim_checks import check, check_choice, check_int, check_list, check_settings
from .averages import EmaSink, MemRoPE
from .deep_sink import deep_sink
from .heads import ByHead, Labels, Pyramid
from .layout import Layout, WindowLayout
from .recall import IdForcing, LatentMemory, Shots
from .tether import Tame, Tether
from .triattention import TriAttention
from .windows import AttentionBias, CommitForcing, InfinityRope, LongLive, Pinned, RollingSink, Strided


def by_head(labels: Labels | str | None = None, layouts: list | None = None) -> ByHead:
    """[`ByHead`], with layouts as in [`make_layout`]."""
    check(isinstance(layouts, (list, tuple)) and len(layouts) > 0, "layouts", layouts, "a list of layouts", TypeError)
    return ByHead(labels, [make_layout(layout) for layout in layouts])


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
    "latent_memory": LatentMemory,
    "id_forcing": IdForcing,
    "shots": Shots,
    "triattention": TriAttention,
    "pyramid": Pyramid,
    "by_head": by_head,
    "strided": Strided,
    "pinned": Pinned,
}

WITH_LABELS = ("pyramid", "by_head")  # that a model's heads need


REQUIRED = ("keep", "view")
OPTIONAL = ("sink", "flush", "recache", "recommit", "committed", "after", "sized", "check", "check_model")
ATTRIBUTES = ("window_size", "num_sink_frames", "one_chunk_a_pass", "for_heads", "by_head", "transitions")
HOOKS_OF_LAYOUTS = ("survey", "before_chunk", "before_commit")


class CompletedLayout(Layout):
    """A user's object with `keep` and `view`; what it lacks is as in [`Layout`].

    Args:
        layout: the object.
    """

    transitions = ("keep",)  # the others would change a context of which only the object knows how it is made

    def __init__(self, layout: Any):
        known = {name: getattr(layout, name, None) for name in (*REQUIRED, *OPTIONAL, *HOOKS_OF_LAYOUTS, *ATTRIBUTES)}
        vars(self).update({name: value for name, value in known.items() if value is not None})
        for verb in ("sized", "after"):  # they return another object
            if known[verb] is not None:
                setattr(self, verb, partial(_completed, known[verb]))


def _completed(verb: Callable[[Any], Any], argument: Any) -> Layout:
    return as_layout(verb(argument))


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
