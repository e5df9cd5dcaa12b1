# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim heads`."""

import argparse
import json
import sys
from pathlib import Path

from ...tokentrim_writing import check_target
from ..checkpoints import check_code, check_folder
from ..numbers import whole
from . import DTYPES, add_command, usage


def add_parser(commands) -> None:
    details = """\
One short rollout that reads all of its past. In each commit, the attention of a head to the past is divided among the first
three frames (sink), the last three (recent) and those between (middle). A head whose attention over distance repeats, with
an autocorrelation above 0.3 once its slope is removed, is a wave; of the others, heads that attend more to the sink than to
recent frames are anchors, and the rest are veils. The rule is ours; attention to the chunk itself is left out.

examples:
  tokentrim heads self-forcing-diffusers --labels heads.json
  tokentrim heads self-forcing-diffusers --queries queries.safetensors

Layouts take the files: layout={"pyramid": {"labels": "heads.json"}}, or {"by_head": {"labels": "heads.json", "layouts":
[...]}} with a layout for waves, anchors and veils, or {"triattention": {"statistics": "queries.safetensors"}}."""
    summary = "classify the attention heads of a checkpoint, for layouts by head"
    parser = add_command(commands, run, "heads", summary, details)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder in Diffusers format")
    parser.add_argument("--prompt", default="a red fox trots through snow", help="(default: %(default)s)")
    parser.add_argument("--chunks", type=whole(1).parse, default=7, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels of all heads to write, .json")
    parser.add_argument("--queries", type=Path, metavar="FILE", help="query statistics to write, .safetensors")


def is_labels(path: Path) -> bool:
    """Whether a file is the JSON of an earlier run."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and {"labels", "kinds", "heads"} <= set(content)


def is_statistics(path: Path) -> bool:
    """Whether a file has the query statistics of an earlier run."""
    with path.open("rb") as file:
        return b'"q_mean_real"' in file.read(2**12)


def run(options: argparse.Namespace) -> int:
    if not options.prompt.strip():
        options.parser.error(f"--prompt must have a word, but is {options.prompt!r}")
    with usage(options):
        if options.labels is not None:
            ours = "labels that `tokentrim heads` wrote"
            check_target("--labels", options.labels, (".json",), is_labels, ours, [options.checkpoint])
        if options.queries is not None:
            ours = "statistics that `tokentrim heads` wrote"
            check_target("--queries", options.queries, (".safetensors",), is_statistics, ours, [options.checkpoint])
    check_folder(options.checkpoint)
    check_code(options.checkpoint, trust_remote_code=False)
    print(f"reading {options.checkpoint}, making {options.chunks} chunks ...", file=sys.stderr, flush=True)
    import torch

    from ..heads import format_heads, survey_heads, write_labels, write_statistics

    dtype = getattr(torch, options.dtype) if options.dtype else None
    heads, statistics = survey_heads(options.checkpoint, options.prompt, options.chunks, dtype)
    print(format_heads(heads))
    if options.labels is not None:
        write_labels(options.labels, heads)
    if options.queries is not None:
        write_statistics(options.queries, statistics)
    return 0
