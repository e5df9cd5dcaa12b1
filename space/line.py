# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Visitors: who they are, their places in the queue, and the file names in their messages. Does not use Gradio."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path


KEPT = 60 * 60  # seconds that files stay after the last change: a program never says that it has left
OF_SESSION, OF_ADDRESS = 2, 8  # places in a line; a new run waits behind the one that it ends
PART = r"[^\s'\"`:;,()\[\]/\\]+"
ABSOLUTE = re.compile(rf"(?<![\w.:/\\])(?:/|[A-Za-z]:[/\\])(?:{PART}[/\\])*({PART})[/\\]?")


@dataclass(eq=False)
class Visitor:
    """Who makes a request.

    Args:
        session (`str`): a tab of a browser, or a program's client.
        address (`str`): its network address, because a program can invent any number of sessions.

    Raises:
        `ValueError`: there is no session; all such callers would share one run.
    """

    session: str
    address: str

    def __post_init__(self):
        if not self.session:
            raise ValueError("This request has no session. Use the page, or the Python package gradio_client.")


class Line:
    """Visitors who wait for their turn, in order of arrival. The first one is served.

    Args:
        size (`int`): number of places.
    """

    def __init__(self, size: int):
        self.size = size
        self.visitors: list[Visitor] = []
        self.lock = threading.Lock()

    @contextmanager
    def place(self, visitor: Visitor) -> Iterator[None]:
        """The last place, until the end of the `with`. Raises `ValueError` if no place is free for this visitor."""
        with self.lock:
            if sum(each.session == visitor.session for each in self.visitors) >= OF_SESSION:
                raise ValueError("Your earlier requests are still in the line. Try again when one of them has ended.")
            if sum(each.address == visitor.address for each in self.visitors) >= OF_ADDRESS:
                raise ValueError("Too many requests of your network are in the line. Try again when one has ended.")
            if len(self.visitors) >= self.size:
                raise ValueError(f"All {self.size} places in the line are taken. Try again in a few minutes.")
            self.visitors.append(visitor)
        try:
            yield
        finally:
            with self.lock:
                self.visitors.remove(visitor)

    def num_before(self, visitor: Visitor) -> int:
        """How many visitors are served before one that has a place."""
        with self.lock:
            return self.visitors.index(visitor)


def is_old(folder: Path) -> bool:
    """Whether a folder exists and got no new file for `KEPT` seconds."""
    return folder.exists() and time.time() - folder.stat().st_mtime > KEPT


def without_folders(text: str) -> str:
    """A message with file names instead of absolute paths."""
    return ABSOLUTE.sub(r"\1", text)


def find_address(client: str, forwarded: str) -> str:
    """
    The network address of a visitor.

    Args:
        client (`str`): who is connected: the visitor, or the proxy of a Space, which has a private address.
        forwarded (`str`): the header `X-Forwarded-For`, which each proxy extends; a visitor can write its beginning.

    Returns:
        `str`: the nearest public address; `client` if all are private.
    """
    for address in [client, *reversed(forwarded.split(","))]:
        with suppress(ValueError):
            if ip_address(address.strip()).is_global:
                return address.strip()
    return client
