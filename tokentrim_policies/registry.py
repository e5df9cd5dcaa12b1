# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The methods that a user can name; turns a name, a dict, a list or an object into policies and hooks."""

import inspect
from dataclasses import dataclass
from typing import Any

from ..tokentrim_checks import check, check_choice, check_settings
from .flowmo import FlowMo
from .hook import CompletedHook, DenoisingHook
from .policy import VERBS, CompletedPolicy, ContextPolicy
from .quarantine import Quarantine
from .reanchor import Reanchor
from .trim import SeverityMonitor, TokenDrift, TokenTrim


POLICIES = {"tokentrim": TokenTrim, "quarantine": Quarantine, "reanchor": Reanchor, "token_drift": TokenDrift}
HOOKS = {"flowmo": FlowMo}
METHODS = {
    "plain": {},
    "tokentrim": {"tokentrim": {}},
    "paper": {"flowmo": {}, "tokentrim": {}},
    "tokentrim_reference": {"tokentrim": {"reference": "first", "prune_fraction": 0.5, "warmup_chunks": 6}},
    "tokentrim_plus": {"quarantine": {"sensitivity": 6.0}, "reanchor": {"match": "near"}},
}
BUILT_IN = {SeverityMonitor, *POLICIES.values()}  # classes that a state is tried out on
DEFAULT_METHOD = "tokentrim"  # where neither the call nor the checkpoint names one


@dataclass(frozen=True)
class Method:
    """What a rollout does beyond generating.

    Args:
        policies (`tuple[ContextPolicy, ...]`): in chain order.
        hooks (`tuple[DenoisingHook, ...]`): of the denoiser, in order.
        drift_signal (`str`): what reviews see, `"final"` or `"first_step"`.
        prune_weight (`float`): the weight of evicted tokens; 0 removes them.
    """

    policies: tuple[ContextPolicy, ...]
    hooks: tuple[DenoisingHook, ...]
    drift_signal: str
    prune_weight: float = 0.0


def make_method(method: Any, trim_settings: dict) -> Method:
    """
    The policies and hooks of a call.

    Args:
        method (`str`, `dict`, `list` or [`ContextPolicy`]):
            A name of `METHODS`, of a policy or of a hook; a dict of policies and hooks by name, each with its settings,
            in chain order; an object with the verbs of [`ContextPolicy`]; or a list of these.
        trim_settings (`dict`): arguments of the call that are settings of TokenTrim, `None` if they are not given.

    Returns:
        [`Method`]: with complete policies and hooks, see [`as_policy`] and [`as_hook`].

    Raises:
        `TypeError`, `ValueError`: an unknown method or setting, or an object without the verbs.
    """
    parts = [_make_part(name, part) for name, part in _list_parts(method, trim_settings)]
    hooks = tuple(as_hook(part) for part in parts if _is_hook(part))
    policies = [as_policy(part) for part in parts if not _is_hook(part)]
    signal = _common("drift signal", {policy.drift_signal for policy in policies}, "final")
    weight = _common("prune weight", {policy.prune_weight for policy in policies}, 0.0)
    if not any(isinstance(policy, SeverityMonitor) and not isinstance(policy, TokenDrift) for policy in policies):
        policies.insert(0, SeverityMonitor(signal))
    return Method(tuple(policies), hooks, signal, weight)


def as_policy(policy: Any) -> ContextPolicy:
    """
    A user's object as a policy that has everything, so that nothing asks what it has after that.

    Args:
        policy: a [`ContextPolicy`], or an object with its five verbs.

    Returns:
        [`ContextPolicy`]: the object itself if it is one; errors and saved runs name its class in any case.

    Raises:
        `TypeError`: it lacks a verb.
    """
    has_verbs = not isinstance(policy, type) and all(callable(getattr(policy, verb, None)) for verb in VERBS)
    valid = (
        f"one of {_names()}, a dict of settings, an object with {', '.join(VERBS)} (as pipe.ContextPolicy), or a list"
    )
    check(has_verbs, "method", policy, valid, TypeError)
    if isinstance(policy, ContextPolicy):
        return policy
    named = type(type(policy).__name__, (CompletedPolicy,), {})
    return named(policy)


def as_hook(hook: Any) -> DenoisingHook:
    """A user's callable with `guides(generated_chunk, step, num_steps)` as a hook that has everything."""
    if isinstance(hook, DenoisingHook):
        return hook
    named = type(type(hook).__name__, (CompletedHook,), {})
    return named(hook)


def _common(name: str, values: set, default: Any) -> Any:
    """The value that all policies share that have one."""
    values = values - {None}
    check(len(values) < 2, "method", sorted(values), f"policies of one {name}")
    return values.pop() if values else default


def _names() -> list[str]:
    return list(dict.fromkeys([*METHODS, *POLICIES, *HOOKS]))


def _list_parts(method: Any, trim_settings: dict) -> list[tuple[str | None, Any]]:
    """(name, settings) or (None, object) of each part. Settings of TokenTrim among the call's arguments are added to its
    own."""
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
    if isinstance(method, str):
        check_choice("method", method, _names())
        return list(METHODS[method].items()) if method in METHODS else [(method, {})]
    if isinstance(method, dict):
        known = [*POLICIES, *HOOKS]
        for name in [each for each in method if each in METHODS and each not in known]:
            check(
                False, "method", method, f"{name!r} without settings, or a dict of what it stands for, {METHODS[name]}"
            )
        check(set(method) <= set(known), "method", list(method), f"a dict of {known} with their settings")
        return list(method.items())
    if isinstance(method, (list, tuple)):
        return [part for each in method for part in _flatten(each)]
    return [(None, method if _is_hook(method) else as_policy(method))]


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
    """Whether an object is callable and has `guides`, and so changes latents before denoising steps."""
    return not isinstance(part, type) and callable(part) and callable(getattr(part, "guides", None))
