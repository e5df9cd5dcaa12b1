"""Rollouts against the same forwards alone: `python -m benchmarks.overhead`."""
