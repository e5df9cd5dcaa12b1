# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The folder of a comparison: what it compares, and a line for each finished video. No PyTorch here."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from ...tokentrim_writing import locked, sync, write_whole
from ..folders import list_content
from ..jobs import check_writable
from .plan import Plan


ABOUT, LINES, GROWING = "comparison.json", "videos.jsonl", ".growing"
FIXED = ("settings", "chunks", "first_seed", "top")  # of a plan: all videos of a folder share them


class Results:
    """
    A folder of results. Methods, prompts and seeds may be added to it; all else stays as it was begun.

    Args:
        out (`Path`): the folder.
    """

    def __init__(self, out: Path):
        self.out = out

    # What is compared

    def check(self) -> None:
        """
        Refuse a folder that cannot be written, or that holds something else.

        Raises:
            `OSError`, `ValueError`: the folder is in the message.
        """
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out must be a folder, but {self.out} is a file.")
        if self.out.is_dir() and list_content(self.out) and not (self.out / ABOUT).is_file():
            raise ValueError(f"--out must be a new folder or one of an earlier comparison, but {self.out} is neither.")
        check_writable(self.out, "--out")
        self.read_about()

    def read_about(self) -> dict[str, Any]:
        """What the folder compares so far; empty for a new one."""
        path = self.out / ABOUT
        if not path.is_file():
            return {}
        try:
            about = json.loads(path.read_text())
            if not isinstance(about, dict) or not isinstance(about.get("methods"), dict):
                raise ValueError("it is not a comparison")
        except ValueError as error:
            raise ValueError(f"--out: {path} is damaged: {error}") from error
        return about

    def join(self, plan: Plan, made_with: dict[str, Any], batch: int) -> Plan:
        """
        The plan, joined with what the folder compares already, which is written down.

        Args:
            plan ([`Plan`]): what is asked for.
            made_with (`dict`): what all videos share besides: weights, dtype, frame rate, ...
            batch (`int`): videos that are generated together, if the folder is new.

        Raises:
            `ValueError`: the folder compares something else; the message says what differs.
        """
        ours = {**{name: getattr(plan, name) for name in FIXED}, **made_with}
        ours = json.loads(json.dumps(ours))
        about = self.read_about()
        different = [
            f"{name} {about[name]!r:.60}, not {ours[name]!r:.60}"
            for name in ours
            if name in about and about[name] != ours[name]
        ]
        before, prompts = tuple(about.get("prompts", ())), plan.prompts
        if before[: len(prompts)] != prompts[: len(before)]:
            different.append("other prompts")
        asked = json.loads(json.dumps(plan.methods))
        for name in asked:
            if about.get("methods", {}).get(name, asked[name]) != asked[name]:
                different.append(f"{name} is {about['methods'][name]!r:.60}, not {asked[name]!r:.60}")
        if different:
            raise ValueError(
                f"--out: {self.out} holds another comparison ({'; '.join(different)}): name another folder."
            )
        joined = replace(
            plan,
            prompts=max(before, prompts, key=len),
            seeds=max(about.get("seeds", 1), plan.seeds),
            batch=plan.batch or about.get("batch") or batch,
        )
        methods = {**about.get("methods", {}), **asked}
        content = {**ours, "methods": methods, "prompts": joined.prompts, "seeds": joined.seeds, "batch": joined.batch}
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / ABOUT, json.dumps({**about, "checkpoint": plan.checkpoint, **content}, indent=1) + "\n")
        return joined

    # Finished videos

    def read(self) -> list[dict[str, Any]]:
        """The lines of finished videos whose files are there, without a line that a kill cut."""
        path, lines = self.out / LINES, {}
        for text in path.read_text().splitlines() if path.is_file() else ():
            try:
                line = json.loads(text)
                key = (line["method"], line["prompt_number"], line["seed"])
            except (TypeError, KeyError, ValueError):
                continue
            if (self.out / line["file"]).is_file():
                lines[key] = line
        return list(lines.values())

    def done(self) -> set[tuple[str, int, int]]:
        return {(line["method"], line["prompt_number"], line["seed"]) for line in self.read()}

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Append finished videos; on the disk when this returns."""
        path = self.out / LINES
        with locked(path, wait=True):
            cut = path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
            with path.open("a") as file:
                file.write("\n" * bool(cut) + "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
            sync(self.out)

    @contextmanager
    def owned(self, is_first: bool = True) -> Iterator[None]:
        """Keep other commands out of the folder; of several processes of one command, the first one does."""
        if not is_first:
            yield
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with locked(self.out / "comparison"):
                yield
        except Timeout as error:
            raise OSError(f"--out: {self.out} is being written by another `tokentrim compare`.") from error
        finally:
            with suppress(OSError):  # unless something was written
                self.out.rmdir()
