# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim convert`."""

import argparse
import logging
import sys
from pathlib import Path

from ..folders import check_new_folder
from ..names import INDEX
from ..presets import PRESETS
from . import DTYPES, add_command


def add_parser(commands) -> None:
    details = """\
The folder stores how its model is rolled out, so `from_pretrained` and a prompt are enough. Conversion fails
if a tensor is left over or missing, and a failure leaves nothing behind. Only tensors are unpickled. Weights are read,
merged and written one by one, so memory for a few of them is enough.

examples:
  tokentrim convert --check
  tokentrim convert self_forcing_dmd.pt --check
  tokentrim convert self_forcing_dmd.pt --preset self_forcing --base Wan2.1-T2V-1.3B-Diffusers \\
      --out self-forcing-diffusers
  tokentrim convert longlive_base.pt --lora lora.pt --preset longlive --base Wan2.1-T2V-1.3B-Diffusers \\
      --out longlive-diffusers"""
    summary = "convert original files of Self Forcing, Rolling Forcing and others to Diffusers folders"
    parser = add_command(commands, run, "convert", summary, details)
    layouts = "{'generator': ..., 'generator_ema': ...}, {'model': ...} or a bare state dict"
    parser.add_argument(
        "path",
        metavar="FILE",
        type=Path,
        nargs="?",
        help=f".pt or .safetensors, laid out as {layouts}; or the folder or index of sharded safetensors",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="Wan2.1 text-to-video folder in Diffusers format, for tokenizer, text encoder and VAE",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the folder to write, new or empty")
    parser.add_argument("--preset", choices=PRESETS, help="what the model was trained for")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="LoRA of LongLive, peft or Diffusers to merge")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="moving average of the weights (default: if the file has it)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer (default: as in the file)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="report the content of FILE and whether it fits, from headers only; without FILE, list presets and memory",
    )


def run(options: argparse.Namespace) -> int:
    lacks = ["FILE"] if options.path is None else []
    lacks += [f"--{name}" for name in ("base", "out", "preset") if getattr(options, name) is None]
    if lacks and not options.check:
        options.parser.error(f"the following arguments are required: {', '.join(lacks)}")
    for name, path in (("path", options.path), ("base", options.base), ("lora", options.lora)):
        if path is not None and not path.exists():
            raise ValueError(f"`{name}` must be a file or a folder, but {path} does not exist.")
    if options.path is not None and (options.path / INDEX).is_file():
        valid = "an original file: a folder in Diffusers format needs no conversion"
        raise ValueError(f"`path` must be {valid}, and {options.path} has a {INDEX}.")
    if options.check and options.path is None:
        from ..dry_run import describe_presets

        print(describe_presets())
        return 0
    if options.check:
        from ..dry_run import describe_conversion

        print(describe_conversion(options.path, options.ema, options.lora, options.base, options.preset))
        return 0
    check_new_folder(options.out)
    print(f"reading {options.path} ...", file=sys.stderr, flush=True)
    import torch

    from ..convert import convert_checkpoint, logger

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    convert_checkpoint(options.path, options.base, options.out, options.preset, options.ema, dtype, options.lora)
    print(options.out)
    return 0
