"""Registers the checkout as the package `tokentrim`, whatever the name of its folder, and blocks the Hub."""

import importlib.util
import os
import sys
from pathlib import Path

import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `training` and `evaluation`, also where pytest is called by its own name

spec = importlib.util.spec_from_file_location(
    "tokentrim", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
sys.modules["tokentrim"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["tokentrim"])

torch.set_num_threads(1)  # the models are tiny: threads only wait for each other
