# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command `tokentrim bundle`: the pipeline and its rooms as one file."""

import sys
from pathlib import Path

from ..tokentrim_files.bundle import bundle, is_bundle
from ..tokentrim_writing import check_target, write_whole


PIPELINE = Path(__file__).parent.parent / "pipeline_tokentrim.py"


def write_bundle(path: Path) -> None:
    """
    Write the file, whole or not at all.

    Raises:
        `ValueError`: it would replace a file that is not a bundle, or shadow the package when Python imports it.
    """
    importable = {Path.cwd(), *(Path(folder).resolve() for folder in sys.path)}
    shadows = path.stem == __name__.partition(".")[0] and path.parent.resolve() in importable
    if shadows:
        valid = "of another name or in another folder: Python would import it instead of the package"
        raise ValueError(f"`FILE` must be {valid}, but is {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    check_target("FILE", path, (".py",), is_bundle, "one that `tokentrim bundle` wrote")
    write_whole(path, bundle(PIPELINE))
