# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Ctrl-C while a video is made: the chunk that is being made is finished and saved first."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def finish_first(stream: Any) -> Iterator[None]:
    """The first Ctrl-C ends the stream after its chunk, the second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def finish(*_) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream.finish()
        print("\nStopping after this chunk; Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, finish)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
