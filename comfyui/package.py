# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Finds the package `tokentrim`: the clone that this folder is part of. A project of this name on PyPI is another one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


CLONE = Path(__file__).resolve().parent.parent


def load_package() -> ModuleType:
    """
    The package, as installed from the clone or straight from it.

    Raises:
        `ImportError`: this folder was copied without the clone.
    """
    if "tokentrim" not in sys.modules:
        if not (CLONE / "pipeline_tokentrim.py").is_file():
            raise ImportError(f"{CLONE} is no clone of TokenTrim for Diffusers: link its comfyui/, do not copy it.")
        spec = importlib.util.spec_from_file_location(
            "tokentrim", CLONE / "__init__.py", submodule_search_locations=[str(CLONE)]
        )
        sys.modules["tokentrim"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tokentrim"])
    return sys.modules["tokentrim"]
