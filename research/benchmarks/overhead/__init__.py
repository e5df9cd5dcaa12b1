# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Rollouts against the same forwards alone: `python -m research.benchmarks.overhead`."""

from .command import main  # noqa: F401
