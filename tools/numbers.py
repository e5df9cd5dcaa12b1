# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Numbers that a user types, as flags and in JSON files: what is valid of each, without PyTorch."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Number(NamedTuple):
    """What a number must be.

    Args:
        is_int (`bool`): whether it has no fraction.
        valid (`str`): in words.
        ok (`Callable`): whether a finite number of that kind is valid.
    """

    is_int: bool
    valid: str
    ok: Callable[[float], bool]

    def parse(self, text: str) -> float:
        """As an argument of the command; raises `argparse.ArgumentTypeError`."""
        try:
            value = int(text) if self.is_int else float(text)
        except ValueError:
            value = None
        if value is None or not (math.isfinite(value) and self.ok(value)):
            raise argparse.ArgumentTypeError(f"must be {self.valid}, but is {text!r}")
        return value

    def check(self, name: str, value: Any) -> None:
        """As a value of a JSON file; raises `ValueError`."""
        is_number = isinstance(value, int if self.is_int else (int, float)) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and self.ok(value)):
            raise ValueError(f"`{name}` must be {self.valid}, but is {value!r}.")


def whole(minimum: int) -> Number:
    return Number(True, f"an int >= {minimum}", lambda value: value >= minimum)


FPS = Number(False, "a number from 0.01 to 1000", lambda value: 0.01 <= value <= 1000)
DISTANCE = Number(False, "a finite number >= 0", lambda value: value >= 0)
TOP = Number(False, "a number above 0, up to 1", lambda share: 0 < share <= 1)
SEED = Number(True, "an int from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
PORT = Number(True, "an int from 1 to 65535", lambda value: 1 <= value <= 65535)
LONGEST = 10**7  # frames: a week at 16 per second; longer videos are endless
NUMBERS = {  # arguments of the call
    "num_frames": Number(True, f"an int from 1 to {LONGEST}", lambda value: 1 <= value <= LONGEST),
    "num_inference_steps": whole(1),
    "height": whole(1),
    "width": whole(1),
    "guidance_scale": Number(False, "a finite number >= 0", lambda value: value >= 0),
    "num_videos_per_prompt": whole(1),
    "num_frames_per_chunk": whole(1),
    "num_sink_frames": whole(0),
    "max_sequence_length": whole(1),
    "blend_chunks": whole(0),
    "context_noise": Number(False, "a timestep from 0 to 1000", lambda value: 0 <= value <= 1000),
    "prune_fraction": Number(False, "a number between 0 and 1", lambda value: 0 < value < 1),
    "drift_sensitivity": Number(False, "a finite number >= 0", lambda value: value >= 0),
    "warmup_chunks": whole(0),
    "max_regenerations": whole(0),
}
