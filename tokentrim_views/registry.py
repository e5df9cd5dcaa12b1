# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The layouts that a user can name, and how a name or a dict becomes one."""

import inspect
from functools import partial
from typing import Any

from ..tokentrim_checks import check, check_choice, check_settings
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


def make_layout(layout: Any) -> Layout:
    """A layout by name, by a dict of one name with its settings, or an object with `keep` and `view`."""
    if isinstance(layout, str):
        layout = {layout: {}}
    if not isinstance(layout, dict):
        has_verbs = not isinstance(layout, type) and all(
            callable(getattr(layout, name, None)) for name in ("keep", "view")
        )
        valid = f"one of {list(LAYOUTS)}, a dict of one of them with its settings, or an object with `keep` and `view`"
        check(has_verbs, "layout", layout, valid, TypeError)
        return layout
    check(len(layout) == 1, "layout", layout, "a dict of one layout with its settings")
    ((name, settings),) = layout.items()
    check_choice("layout", name, tuple(LAYOUTS))
    kind = LAYOUTS[name]
    check_settings(f"layout[{name!r}]", settings, list(inspect.signature(kind).parameters))
    return kind(**settings)
