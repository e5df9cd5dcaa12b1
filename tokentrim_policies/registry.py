# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The methods that a user can name, and how a name, a dict or a list becomes policies and hooks."""

import inspect
from dataclasses import dataclass
from typing import Any

from ..tokentrim_checks import check, check_choice, check_settings
from .flowmo import FlowMo
from .policy import VERBS
from .quarantine import Quarantine
from .reanchor import Reanchor
from .trim import SeverityMonitor, TokenDrift, TokenTrim


POLICIES = {"tokentrim": TokenTrim, "quarantine": Quarantine, "reanchor": Reanchor, "token_drift": TokenDrift}
HOOKS = {"flowmo": FlowMo}
METHODS = {
    "plain": {},
    "tokentrim": {"tokentrim": {}},
    "paper": {"flowmo": {}, "tokentrim": {}},
    "tokentrim_plus": {"quarantine": {"sensitivity": 6.0}, "reanchor": {"match": "near"}},
}
DEFAULT_METHOD = "tokentrim"  # where neither the call nor the checkpoint names one


@dataclass(frozen=True)
class Method:
    """What a rollout does beyond generating: policies in chain order, hooks of the denoiser, what reviews see, and what
    the tokens that they ask for still count for."""

    policies: tuple
    hooks: tuple
    drift_signal: str
    prune_weight: float = 0.0


def make_method(method: Any, trim_settings: dict) -> Method:
    """
    The policies and hooks of a call.

    Args:
        method (`str`, `dict`, `list` or [`ContextPolicy`]):
            A name of `METHODS`, of a policy or of a hook; a dict of policies and hooks by name, each with its settings,
            in chain order; an object with the verbs of [`ContextPolicy`]; or a list of such.
        trim_settings (`dict`): arguments of the call that are settings of TokenTrim, `None` where not given.

    Raises:
        `TypeError`, `ValueError`: an unknown method or setting, or an object without the verbs.
    """
    parts = [_make_part(name, part) for name, part in _list_parts(method, trim_settings)]
    hooks = tuple(part for part in parts if _is_hook(part))
    policies = [part for part in parts if not _is_hook(part)]
    signal = _common(policies, "drift_signal", "final")
    weight = _common(policies, "prune_weight", 0.0)
    if not any(isinstance(policy, SeverityMonitor) and not isinstance(policy, TokenDrift) for policy in policies):
        policies.insert(0, SeverityMonitor(signal))
    return Method(tuple(policies), hooks, signal, weight)


def _common(policies: list, name: str, default: Any) -> Any:
    """What the policies that it matters to have in common."""
    values = {getattr(policy, name, None) for policy in policies} - {None}
    check(len(values) < 2, "method", sorted(values), f"policies of one {name.replace('_', ' ')}")
    return values.pop() if values else default


def _list_parts(method: Any, trim_settings: dict) -> list[tuple[str | None, Any]]:
    """(name, settings) or (None, object) of each part; TokenTrim's settings among the call's arguments join its own."""
    parts = _flatten(method)
    given = {name: value for name, value in trim_settings.items() if value is not None}
    for name, value in given.items():
        has_trim = any(part == "tokentrim" for part, _ in parts)
        valid = f"None for a method without TokenTrim, here {method!r}: pass `method='tokentrim'` with it"
        check(has_trim, name, value, valid)
    return [
        (name, {**given, **part} if name == "tokentrim" and isinstance(part, dict) else part) for name, part in parts
    ]


def _flatten(method: Any) -> list[tuple[str | None, Any]]:
    names = list(dict.fromkeys([*METHODS, *POLICIES, *HOOKS]))
    if isinstance(method, str):
        check_choice("method", method, names)
        return list(METHODS[method].items()) if method in METHODS else [(method, {})]
    if isinstance(method, dict):
        known = [*POLICIES, *HOOKS]
        check(set(method) <= set(known), "method", list(method), f"a dict of {known} with their settings")
        return list(method.items())
    if isinstance(method, (list, tuple)):
        return [part for each in method for part in _flatten(each)]
    has_verbs = not isinstance(method, type) and all(callable(getattr(method, verb, None)) for verb in VERBS)
    valid = f"one of {names}, a dict of settings, an object with {', '.join(VERBS)} (as pipe.ContextPolicy), or a list"
    check(has_verbs or _is_hook(method), "method", method, valid, TypeError)
    return [(None, method)]


def _make_part(name: str | None, part: Any) -> Any:
    if name is None:
        return part
    kind = {**POLICIES, **HOOKS}[name]
    check_settings(f"method[{name!r}]", part, list(inspect.signature(kind).parameters))
    try:
        return kind(**part)
    except (TypeError, ValueError) as error:
        raise type(error)(f"method[{name!r}]: {error}") from None


def _is_hook(part: Any) -> bool:
    """Whether it changes latents before a denoising step: `guides(generated_chunk, step, num_steps)`, and a call."""
    return not isinstance(part, type) and callable(part) and callable(getattr(part, "guides", None))
