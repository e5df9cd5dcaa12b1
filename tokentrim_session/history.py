# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The states of a run that a stream keeps: in a folder, to resume it, and of the last few chunks, to take them back."""

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..tokentrim_checks import check, check_int
from ..tokentrim_files.packing import pack_state, unpack_state
from ..tokentrim_files.run_state import forget_states, list_numbers, load_state, save_state


class History:
    """
    Where the states of a stream go. Chunks can be taken back as far as there are states.

    Args:
        folder (`str` or `os.PathLike`, *optional*): folder that the run is saved to.
        every (`int`): chunks between two states in the folder; with `keep`, each chunk has one.
        keep (`int`): chunks that can be taken back; their states are in the folder, or without one in memory.
        origin (`Callable`): gives what a state in a folder says beside the run: call, settings and weights.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        every: int = 10,
        keep: int = 0,
        origin: Callable[[], dict] = dict,
    ):
        self.folder, self.every, self.keep, self._origin = folder, every, keep, origin
        self.saved_at: int | None = None  # the chunk before which the last state was taken
        self._states: deque[tuple[int, Any]] = deque(maxlen=keep + 1)  # in memory, by number

    def is_due(self, index: int, is_over: bool) -> bool:
        """Whether the run is saved now, before chunk `index`, or where it is over."""
        if self.folder is None:
            return self.keep > 0 and self.saved_at != index
        if self.saved_at is None:
            return True
        passed = index - self.saved_at
        return passed >= (1 if self.keep else self.every) or (is_over and passed > 0)

    def save(self, index: int, state: dict, folder: str | os.PathLike | None = None) -> Path | None:
        """Keep a state: in another folder, in that of the stream, or in memory."""
        is_ours = self.folder is not None and (folder is None or Path(folder) == Path(self.folder))
        if folder is not None or is_ours:
            state = {**self._origin(), "save_every": self.every, "keep_states": self.keep, **state}
        if folder is not None and not is_ours:
            return save_state(folder, index, state)
        self.saved_at = index
        if is_ours:
            return save_state(self.folder, index, state, self.keep)
        self._states = deque(((number, each) for number, each in self._states if number < index), self.keep + 1)
        self._states.append((index, pack_state(state)))
        return None

    def take_back(self, index: int, num_chunks: int) -> dict:
        """
        The state `num_chunks` before chunk `index`. Those after it are forgotten.

        Raises:
            `ValueError`: there is no such state.
        """
        check_int("num_chunks", num_chunks, 1)
        numbers = [number for number, _ in self._states] if self.folder is None else list_numbers(self.folder)
        known = sorted({index - number for number in numbers if 0 <= number < index})
        valid = f"one of {known}, the chunks back that have a state"
        valid = valid if self.keep else "0 in a stream without `keep_states`"
        check(self.keep > 0 and num_chunks in known, "num_chunks", num_chunks, valid)
        number = index - num_chunks
        if self.folder is None:
            state = unpack_state(*dict(self._states)[number])
            self._states = deque((each for each in self._states if each[0] <= number), self.keep + 1)
        else:
            state = load_state(self.folder, number)
            forget_states(self.folder, number)
        self.saved_at = None  # what is changed from here on is saved with the next chunk
        return state
