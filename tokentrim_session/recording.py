# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The files that grow with a stream: an mp4 for each video, and its decisions beside it."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from ..tokentrim_checks import check, plain
from ..tokentrim_frames.mp4 import VIDEO_ENDINGS, LineWriter, VideoWriter, check_fps
from ..tokentrim_frames.output import as_array, as_uint8
from ..tokentrim_writing import check_target, is_decision_log, locked, numbered


class Recording:
    """
    New files; or, where the run was resumed, the same ones, cut back to where it stands.

    Args:
        path (`str` or `os.PathLike`): the file, `x.mp4`; several videos are numbered, `x-0.mp4`, `x-1.mp4`.
        num_videos (`int`): of the run.
        fps (`float`, *optional*): frames per second; by default those of the file of a resumed run, or `default_fps`.
        default_fps (`float`): of the model.
        known (`Sequence`): path and state of each file that a resumed run writes.

    Raises:
        `OSError`: a folder does not exist or cannot be written.
        `ValueError`: a path has another ending, `x.jsonl` is another program's, or a resumed run wrote to other files.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        num_videos: int,
        fps: float | None,
        default_fps: float,
        known: Sequence = (),
    ):
        self.paths = [numbered(check_target("path", path, VIDEO_ENDINGS), n, num_videos) for n in range(num_videos)]
        fps, default_fps = plain(fps), plain(default_fps)
        logs, states = [path.with_suffix(".jsonl") for path in self.paths], dict(known)
        for video, log in zip(self.paths, logs):
            check_target("path", video, VIDEO_ENDINGS)
            ours = f"the decisions of an earlier video ({video.name} has its decisions beside it)"
            check_target("path", log, is_ours=is_decision_log, ours=ours)
        for each in (*self.paths, *logs) if states else ():
            check(str(each) in states, "path", str(each), f"a file that the run began: one of {sorted(states)}")
        self.fps = states[str(self.paths[0])]["fps"] if states else default_fps if fps is None else fps
        check(not states or fps in (None, self.fps), "fps", fps, f"{self.fps}, as the file has it")
        check_fps(self.fps)
        with ExitStack() as held:
            for video in self.paths:
                held.enter_context(sole_writer(video))
            if states:
                self._writers = [VideoWriter.resume(each, states[str(each)]) for each in self.paths]
                self._logs = [LineWriter.resume(each, states[str(each)]) for each in logs]
            else:
                self._writers = [VideoWriter(each, self.fps) for each in self.paths]
                self._logs = [LineWriter(each) for each in logs]
            self._held = held.pop_all()

    def add(self, frames: Any, decisions: list[dict]) -> None:
        """Append a chunk, to the disk."""
        for writer, video in zip(self._writers, as_array(frames)):
            writer.write(as_uint8(video))
        for log, decision in zip(self._logs, decisions):
            log.write(json.dumps(decision))

    def cut_back(self, states: Sequence) -> None:
        """Cut the files back to where their states were taken."""
        known = dict(states)
        self._writers = [VideoWriter.resume(each.path, known[str(each.path)]) for each in self._writers]
        self._logs = [LineWriter.resume(each.path, known[str(each.path)]) for each in self._logs]

    def states(self) -> list[list]:
        """Path and state of each file."""
        return [[str(file.path), file.state] for file in (*self._writers, *self._logs)]

    def close(self) -> None:
        """Let others write the files."""
        self._held.close()


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Two streams that grow one file would make a mixture of both."""
    try:
        with locked(Path(os.path.realpath(path))):
            yield
    except Timeout:
        raise ValueError(f"`path` must be a file that no other stream writes, but {path} is being written.") from None
