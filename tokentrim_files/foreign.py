# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Folders of Wan models that other programs wrote in Diffusers' layout: their class names and fields, as rollout settings.

FastVideo and SGLang name causal transformers by classes that Diffusers does not have, and say in `transformer/config.json`
how they are rolled out, in latent frames. Needs no PyTorch.
"""

from typing import Any


STOCK_CLASS = "WanTransformer3DModel"
CAUSAL_CLASS, ROLLING_CLASS = "CausalWanTransformer3DModel", "RollingForcingWanTransformer3DModel"
FOREIGN_FIELDS = {  # what these programs take where a config says nothing
    CAUSAL_CLASS: {
        "num_frames_per_block": 3,
        "sink_size": 0,
        "sliding_window_num_frames": 21,
        "local_attn_size": -1,
        "rope_cache_policy": "absolute",
    },
    ROLLING_CLASS: {
        "num_frames_per_block": 3,
        "sink_size": 3,
        "sliding_window_num_frames": 24,  # of the buffer; attention spans less
        "max_attention_num_frames": 21,
    },
}
FOREIGN_PIPELINES = {
    "WanCausalDMDPipeline": CAUSAL_CLASS,  # FastVideo
    "CausalForcingPipeline": CAUSAL_CLASS,  # SGLang, also Self Forcing
    "WanCausalForcingPipeline": CAUSAL_CLASS,
    "WanRollingForcingPipeline": ROLLING_CLASS,
}
UNKNOWN_PARTS = {  # of a causal config, that make it another model
    "boundary_ratio": "two transformers, as in Wan 2.2",
    "r_embedder": "a second timestep, as in AnyFlow",
    "image_dim": "an image encoder",
}
FOREIGN_CONFIG = (
    "_foreign"  # where a transformer's config keeps class and fields: Diffusers warns about unknown public names
)
FOREIGN_NAMES = {name for fields in FOREIGN_FIELDS.values() for name in fields} | {"boundary_ratio", "r_embedder"}


def foreign_class(index: dict[str, Any]) -> str | None:
    """
    The class of a folder's transformer, where another program wrote the folder: one of `FOREIGN_FIELDS`, or `STOCK_CLASS` in a
    folder of a Wan pipeline of Diffusers, which is bidirectional. `None` for all others.

    Raises:
        `ValueError`: pipeline and transformer contradict each other, or there are two transformers.
    """
    part, pipeline, second = (index.get(name) for name in ("transformer", "_class_name", "transformer_2"))
    kind = part[1] if isinstance(part, (list, tuple)) and len(part) == 2 else None
    if kind in FOREIGN_FIELDS:
        expected = FOREIGN_PIPELINES.get(pipeline, kind) if isinstance(pipeline, str) else kind
        _require_causal(expected == kind, f"`model_index.json` names {pipeline}, which has {expected}, and {kind}")
        two = isinstance(second, (list, tuple)) and bool(second) and second[0] is not None
        _require_causal(not two, f"`model_index.json` names {UNKNOWN_PARTS['boundary_ratio']}")
        return kind
    return kind if kind == STOCK_CLASS and isinstance(pipeline, str) and pipeline.startswith("Wan") else None


def read_fields(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """
    Class and fields of a causal transformer.

    Args:
        kind (`str`): the class that the folder's index names.
        config (`dict`): of the transformer.

    Raises:
        `ValueError`: the config names another class, or is that of another model.
    """
    named = config.get("_class_name")
    _require_causal(named in (kind, STOCK_CLASS, None), f"`model_index.json` names {kind} and its config {named}")
    for name, found in UNKNOWN_PARTS.items():
        _require_causal(not config.get(name), f"`{name}` of its config is {config.get(name)!r:.60}: {found}")
    given = {name: config[name] for name in FOREIGN_FIELDS[kind] if config.get(name) is not None}
    return {"class": kind, **FOREIGN_FIELDS[kind], **given}


def rollout_settings(config: dict[str, Any]) -> dict[str, Any]:
    """
    The pipeline's settings that the fields of a causal transformer's config stand for; empty for other transformers.

    Args:
        config (`dict`): with the fields as they were written, or as [`read_fields`] keeps them.

    Raises:
        `ValueError`: a field has an invalid value, or fields contradict each other.
    """
    fields = config.get(FOREIGN_CONFIG)
    if not isinstance(fields, dict):
        kind = config.get("_class_name")
        if kind not in FOREIGN_FIELDS:  # Diffusers keeps unknown fields, but not the class
            kind = ROLLING_CLASS if "max_attention_num_frames" in config else CAUSAL_CLASS
        if "num_frames_per_block" not in config and config.get("_class_name") != kind:
            return {}
        fields = read_fields(kind, config)
    if fields["class"] not in FOREIGN_FIELDS:
        return {}
    is_rolling, span = fields["class"] == ROLLING_CLASS, "sliding_window_num_frames"
    if is_rolling:
        span = "max_attention_num_frames"
    elif fields["local_attn_size"] != -1:  # -1: all frames, as many as the buffer holds
        span = "local_attn_size"
    _check_fields(fields, span)
    moves = fields.get("rope_cache_policy") == "relativistic" and fields["sink_size"] and span == "local_attn_size"
    return {
        "rollout": "rolling_forcing" if is_rolling else "self_forcing",
        "num_frames_per_chunk": fields["num_frames_per_block"],
        "num_inference_steps": 5 if is_rolling else 4,  # of all published weights in these layouts
        "window_size": fields[span],
        "num_sink_frames": fields["sink_size"],
        "relative_positions": is_rolling or bool(moves),
    }


def folder_settings(index: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a folder says in its fields, as [`rollout_settings`], from its index and its transformer's config."""
    kind = foreign_class(index)
    return rollout_settings({FOREIGN_CONFIG: read_fields(kind, config)}) if kind in FOREIGN_FIELDS else {}


def _check_fields(fields: dict[str, Any], span: str) -> None:
    """Fields of valid values that do not contradict each other; `span` names the one that attention spans."""
    for name, least in (("num_frames_per_block", 1), ("sink_size", 0), ("sliding_window_num_frames", 1), (span, 1)):
        ok = type(fields[name]) is int and fields[name] >= least
        _require_causal(ok, f"`{name}` of its config is {fields[name]!r:.60}, which must be an int >= {least}")
    chunk, sink, window = (fields[name] for name in ("num_frames_per_block", "sink_size", span))
    parts = f"the sink of {sink} latent frames (`sink_size`) and a chunk of {chunk} (`num_frames_per_block`)"
    _require_causal(sink + chunk <= window, f"{parts} do not fit into the {window} of `{span}`")
    buffer = fields["sliding_window_num_frames"]
    fits = window <= buffer or span == "local_attn_size"
    _require_causal(fits, f"`{span}` is {window}, above the {buffer} of `sliding_window_num_frames`")
    policy = fields.get("rope_cache_policy", "absolute")
    known = policy in ("absolute", "relativistic")
    _require_causal(known, f"`rope_cache_policy` is {policy!r:.60}, which must be 'absolute' or 'relativistic'")


def _require_causal(ok: bool, found: str) -> None:
    if not ok:
        raise ValueError(f"`transformer` must be that of one causal Wan 2.1 text-to-video model, but {found}.")
