# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""A video while it is generated: an iterator over chunks that can be closed, saved, and written to a growing file."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..tokentrim_backbones.parallel import check_saved_whole
from ..tokentrim_checks import check
from ..tokentrim_frames.decode import FrameDecoder, latents_kept
from ..tokentrim_frames.summary import as_page
from .chunk import Chunk
from .history import History
from .host import Pipeline
from .noise import check_like
from .progress import Progress, ProgressBar
from .recording import Recording
from .run import Rollout


class Stream:
    """
    Iterator over the finished chunks of a run, and a context manager. The transformer is restored and the cache freed
    at the end, on leaving the `with`, and by [`close`], an exception or garbage collection.

    Args:
        pipe ([`Pipeline`]): the pipeline.
        run ([`Rollout`]): the run, new or resumed.
        decoder ([`FrameDecoder`], *optional*): decodes chunks; `None` for latents.
        history ([`History`], *optional*): where its states go.
        files (`Sequence`): path and state of each file that a resumed run continues.
        undecoded (`Sequence`, *optional*): index, latents and decisions of a finished chunk whose decoding failed.
        held (`ExitStack`, *optional*): what is released when the stream is closed, such as the lock of its `state_dir`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        run: Rollout,
        decoder: FrameDecoder | None = None,
        history: History | None = None,
        files: Sequence = (),
        undecoded: Sequence | None = None,
        held: ExitStack | None = None,
    ):
        self._held = held or ExitStack()
        self._history = history or History()
        check_saved_whole(pipe.transformer, "state_dir", self._history.folder)
        check_saved_whole(pipe.transformer, "keep_states", self._history.keep or None)
        self.run: Rollout | None = run  # `None` once it is closed
        self.decoder = decoder
        self.grid = run.grid
        self._undecoded = None if undecoded is None else Chunk(*undecoded)
        self.first_chunk = self.index
        self.progress = Progress(run.sizes, self.first_chunk, pipe.fps)
        self._pipe = pipe
        self._chunks = pipe.roll_out(run)
        if files or run.index:
            self._history.saved_at = run.index  # it was resumed from there
        self._recording: Recording | None = None
        self._files = files
        self._is_last = self._went_back = False
        self.cut_short = False  # whether `finish` ended it before its last chunk

    # 1. An iterator and a context manager

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self.run is None:
            raise StopIteration
        try:
            chunk = None
            while chunk is None:
                self._save_if_due()  # the chunk before has been consumed
                if self._is_last:
                    self.cut_short = self.run.sizes.has_chunk(self.run.index)
                    if self._history.folder is not None and self._history.saved_at != self.run.index:
                        self.save_state()
                    raise StopIteration
                chunk = self._finished()
        except BaseException:
            self.close()
            raise
        return chunk

    def __repr__(self) -> str:
        return f"<Stream{'' if self.run else ', closed'}: {self.progress.tell()}>"

    def __str__(self) -> str:
        return self.progress.tell()

    def _repr_html_(self) -> str:
        """How far it is, for notebooks; chunks show their frames."""
        return as_page([repr(self)[1:-1]])

    def finish(self) -> None:
        """Stop after the chunk that is being made; with a `state_dir`, the run is saved there. Safe in a signal handler."""
        self._is_last = True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop: restore the transformer, free the cache."""
        if self.run is None:
            return
        try:
            self._chunks.close()
            self.run = None
            self._pipe.maybe_free_model_hooks()
        finally:
            self._held.close()

    # 2. What can be asked of it while it runs

    @property
    def index(self) -> int:
        """The next chunk."""
        return self._running().index - (self._undecoded is not None)

    def set_prompt(
        self,
        prompt: str | list[str] | torch.Tensor,
        transition: str | None = None,
        blend_chunks: int = 0,
    ) -> None:
        """
        Another prompt from the next chunk on.

        Args:
            prompt (`str`, `list[str]` or `torch.Tensor`): one for all, one for each, or embeddings (B, text, dim).
            transition (`str`, *optional*): one of those of `prompt_transition`. By default the call's, if it is one.
            blend_chunks (`int`, defaults to `0`): chunks over which the embeddings move to the new ones.
        """
        self._running().change_prompt(prompt, transition, blend_chunks)

    def set_generator(self, generator: torch.Generator | list[torch.Generator]) -> None:
        """
        Other random numbers from the next chunk on. Noise that was given as `latents`, or drawn for chunks in flight, stays.

        Args:
            generator (`torch.Generator` or `list[torch.Generator]`): its state is copied; a list where the call has one.
        """
        self._running().change_generator(generator)

    @torch.no_grad()
    def back(self, num_chunks: int = 1, generator: torch.Generator | list[torch.Generator] | None = None) -> None:
        """
        Return to where the run stood before its last chunks: they are made again. A file that grows is cut back. Needs
        `keep_states` of [`stream`]; may be called between two chunks and by `on_chunk`.

        Args:
            num_chunks (`int`, defaults to `1`): chunks to take back, up to `keep_states`.
            generator (*optional*): as in [`set_generator`]. Without it, and with the same prompt, the chunks come out the
                same.

        Raises:
            `ValueError`: there is no state so far back; the message says how far there is.
        """
        run = self._running()
        if generator is not None:
            check_like(generator, run.generator)
        state = self._history.take_back(self.index, num_chunks)
        self._chunks.close()
        if self._recording is not None:
            self._recording.cut_back(state["files"])
        run.load_state_dict(state["run"])
        if self.decoder is not None:
            self.decoder.load_state_dict(state["decoder"])
        self._undecoded = None if state["undecoded"] is None else Chunk(*state["undecoded"])
        self._chunks, self._went_back = self._pipe.roll_out(run), True
        self.progress.cut_back(self.index)
        if generator is not None:
            self.set_generator(generator)

    def save_state(self, folder: str | os.PathLike | None = None) -> Path:
        """Save the run as it is between two chunks, by default to its `state_dir`."""
        run, history = self._running(), self._history
        folder = history.folder if folder is None else folder
        check_saved_whole(self._pipe.transformer, "folder", folder)
        check(folder is not None, "folder", folder, "given for a stream without `state_dir`")
        return history.save(run.index, self._state(), folder)

    # 3. A growing file

    def save_video(self, path: str | os.PathLike, fps: float | None = None, progress: bool = True) -> list[Path]:
        """
        Consume the stream into an mp4 that plays up to the last finished chunk, whenever the process dies, and a file
        beside it, `x.jsonl`, with the decision of each chunk on a line.

        Args:
            path (`str` or `os.PathLike`): the file; several videos are numbered, `x-0.mp4`, `x-1.mp4`.
            fps (`float`, *optional*): frames per second; by default those of the file of a resumed run, or `pipe.fps`.
            progress (`bool`, defaults to `True`): whether to show a bar: chunks, seconds of video, frames per
                second, what the method did, and memory.

        Returns:
            `list[Path]`: the file of each video.

        Raises:
            `OSError`: a disk is full, ffmpeg fails; the files end with the last whole chunk. Or the folder does not exist.
            `ValueError`: the videos are latents, the path does not end with .mp4, `x.jsonl` is another program's, chunks
                were already taken from the stream, or a resumed run wrote to other files.
        """
        run = self._running()
        check(self.decoder is not None, "output_type", run.plan.output_type, "not 'latent' to write a video")
        taken = self.index - (self.first_chunk if self._files else 0)
        if taken or self._recording is not None:
            told = f"but {taken} of them are gone from this stream: call `save_video` on a new one."
            raise ValueError(f"`path` must be given before the first chunk is taken, {told}")
        self._recording = Recording(path, run.sizes.num_videos, fps, self._pipe.fps, self._files)
        run.shows_steps = False
        self.progress.fps = self._recording.fps
        bar = ProgressBar(self.progress, disable=not progress)
        try:
            for _ in self:
                bar.update()
        finally:
            bar.close()
            self._recording.close()
        return self._recording.paths

    def _finished(self) -> Chunk | None:
        """The next chunk, after `on_chunk` and the files have it; `None` if `on_chunk` took it back."""
        chunk = self._decoded(self._undecoded or next(self._chunks))
        on_chunk, self._went_back = self.run.plan.callbacks.on_chunk, False
        if on_chunk is not None and chunk.index >= self.run.sizes.num_given_chunks:
            on_chunk(chunk.index, chunk.latents.clone(), copy.deepcopy(chunk.decisions))
        if self._went_back:
            return None
        if self._recording is not None:
            self._recording.add(chunk.frames, chunk.decisions)
        self.progress.add(chunk)
        return chunk

    def _state(self) -> dict:
        """Of the run, of what decodes it and of its files, between two chunks."""
        undecoded = self._undecoded
        return {
            "run": self.run.state_dict(),
            "decoder": None if self.decoder is None else self.decoder.state_dict(),
            "undecoded": undecoded and [getattr(undecoded, name) for name in ("index", "latents", "decisions")],
            "files": [] if self._recording is None else self._recording.states(),
        }

    def _decoded(self, chunk: Chunk) -> Chunk:
        """With its frames. If that fails, as where memory runs out, the chunk is in the error and in the state."""
        if self.decoder is None:
            return chunk
        plan, before = self.run.plan, self.decoder.state_dict()
        try:
            with latents_kept(chunk.latents):
                video = self.decoder.decode(chunk.latents)
                video = video[:, :, : video.shape[2] - plan.sizes.frames_beyond(chunk.index)]
                frames = self._pipe.video_processor.postprocess_video(video, output_type=plan.output_type)
        except Exception as error:
            self.decoder.load_state_dict(before)
            self._undecoded = chunk
            if self._history.folder is not None:
                try:
                    self.save_state()
                except OSError as unsaved:
                    error.add_note(str(unsaved))
            raise
        if self._undecoded is not None and self._history.keep:
            self._history.saved_at = None  # the state of this chunk is without it
        self._undecoded = None
        return replace(chunk, frames=frames, fps=self.progress.fps)

    def _running(self) -> Rollout:
        if self.run is None:
            raise RuntimeError("The stream is closed.")
        return self.run

    def _save_if_due(self) -> None:
        if self.run is None or not self._history.is_due(self.run.index, not self.run.sizes.has_chunk(self.run.index)):
            return
        if self._history.folder is None:
            self._history.save(self.run.index, self._state())
        else:
            self.save_state()
