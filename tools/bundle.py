# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command `tokentrim bundle`: the pipeline and its rooms as one file."""

import os
import sys
from pathlib import Path

from ..tokentrim_checks import check
from ..tokentrim_files.bundle import bundle, is_bundle


PIPELINE = Path(__file__).parent.parent / "pipeline_tokentrim.py"


def write_bundle(path: Path) -> None:
    """
    Write the file, whole or not at all.

    Raises:
        `ValueError`: it would replace a file that is not a bundle, or shadow the package when Python imports it.
    """
    check(is_bundle(path) or not path.exists(), "FILE", str(path), "a new file, or one that `tokentrim bundle` wrote")
    importable = {Path.cwd(), *(Path(folder).resolve() for folder in sys.path)}
    shadows = path.stem == __name__.partition(".")[0] and path.parent.resolve() in importable
    valid = "of another name or in another folder: Python would import it instead of the package"
    check(not shadows, "FILE", str(path), valid)
    source = bundle(PIPELINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(source)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
