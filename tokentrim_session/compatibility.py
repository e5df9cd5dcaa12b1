# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Whether the method, the layout and the backbone of a call fit together."""

import logging
from collections.abc import Sequence

from ..tokentrim_backbones.backbone import Limits
from ..tokentrim_checks import check
from ..tokentrim_policies.registry import Method
from ..tokentrim_views.layout import Layout, WindowLayout


SINK_COLLAPSE = 120  # latent frames from which a sink at absolute positions is known to fail (LoL, arXiv 2601.16914)

compatibility_logger = logging.getLogger("tokentrim.plan")


def check_method(method: Method, limits: Limits, chunk_sizes: Sequence[int], num_tokens: int) -> None:
    """Refuse a method that cannot serve the backbone, generated chunks of `chunk_sizes` latent frames, or latent frames of
    `num_tokens` tokens."""
    valid = f"0 for {limits.model}, which has no weights"
    check(limits.weights or not method.prune_weight, "prune_weight", method.prune_weight, valid)
    for hook in method.hooks:
        hook.check(chunk_sizes, method.drift_signal)
    for policy in method.policies:
        policy.check(num_tokens)


def fit_layout(layout: Layout, limits: Limits, num_in_flight: int, chunk_sizes: Sequence[int]) -> Layout:
    """The layout, sized for the passes of this rollout. Refuse one that they do not fit into; warn of a sink that is known
    to fail."""
    num_carried = max(num_in_flight, limits.chunks_per_pass)
    starts = range(max(len(chunk_sizes) - num_carried, 0) + 1)
    longest = max(sum(chunk_sizes[start : start + num_carried]) for start in starts)
    valid = f"another for passes of {num_carried} chunks (Rolling Forcing, AnyFlow-FAR): it needs passes of one chunk"
    check(num_carried == 1 or not layout.one_chunk_a_pass, "layout", type(layout).__name__, valid)
    layout = layout.sized(longest)
    layout.check_model(*limits.sizes)
    layout.check(longest, "a chunk" if num_carried == 1 else f"{num_carried} chunks in one pass")
    if isinstance(layout, WindowLayout) and layout.num_sink_frames and not layout.relative_positions:
        if layout.window_size is not None and sum(chunk_sizes) > SINK_COLLAPSE:
            compatibility_logger.warning(
                "a sink at absolute positions is known to fail beyond %d latent frames (sink collapse, arXiv 2601.16914):"
                " pass relative_positions=True where the model allows it",
                SINK_COLLAPSE,
            )
    return layout


def check_rejections(method: Method, layout: Layout, num_in_flight: int, chunk_sizes: Sequence[int]) -> None:
    """Refuse a window that is empty once chunks that a policy rejected have passed through it."""
    window_size = layout.window_size
    if window_size is None or layout.num_sink_frames > 0:
        return
    shortest = (num_in_flight + 2) * max(chunk_sizes)
    for policy in method.policies:
        ok = window_size >= shortest or not policy.may_reject
        valid = f"without {type(policy).__name__} with `window_size` {window_size} and no sink: it needs a sink, or"
        check(ok, "method", [type(each).__name__ for each in method.policies], f"{valid} {shortest} latent frames")
