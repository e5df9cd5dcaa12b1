# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim generate` under SIGKILL at random moments, alone and in pairs on one folder, and on a full disk.

    python -m research.benchmarks.interruptions --kills 20

In every case, a finished video must play to its last frame and equal an undisturbed one byte by byte, and the last start
must make all missing videos. The full disk is a tmpfs; mounting it needs root rights.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tokentrim.tools.cli import main as tokentrim
from tokentrim.tools.generate import play


WORLD = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny-world"
PROMPTS = ("a red circle moving right over a blue background", "a green square moving left over a yellow background")
NUM_FRAMES = 9  # three chunks of the tiny world


class Started:
    """The command in a forked process, so that its imports load only once."""

    def __init__(self, out: Path):
        options = [
            "--checkpoint",
            str(WORLD),
            "--prompts",
            "prompts.txt",
            "--config",
            "config.json",
            "--out",
            str(out),
        ]
        self.code = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 3
            try:
                os.chdir(out.parent)
                for descriptor in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
                code = tokentrim(["generate", *options])
            finally:
                os._exit(code)

    def kill(self) -> bool:
        """Kill the process; returns whether it was still running."""
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet, so its id is still valid
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def check_done(out: Path, whole: dict[str, bytes]) -> int:
    """Check the finished videos; returns their number."""
    done = sorted(path for path in out.glob("*.mp4") if ".growing." not in path.name)
    for path in done:
        assert play(path) == NUM_FRAMES, f"{path} does not play to its end"
        assert path.read_bytes() == whole[path.name], f"{path} is another video"
        assert json.loads(path.with_suffix(".json").read_text())["prompt"] in PROMPTS
    return len(done)


def check_all(out: Path, whole: dict[str, bytes]) -> None:
    """The next start makes the missing videos and leaves no other file."""
    assert Started(out).wait() == 0
    assert check_done(out, whole) == len(PROMPTS)
    assert len(list(out.iterdir())) == 3 * len(PROMPTS), sorted(path.name for path in out.iterdir())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of one process, and of one of two (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        (folder / "config.json").write_text(json.dumps({"num_frames": NUM_FRAMES, "num_inference_steps": 2}))
        began = time.perf_counter()
        assert Started(folder / "whole").wait() == 0
        seconds = time.perf_counter() - began
        whole = {path.name: path.read_bytes() for path in (folder / "whole").glob("*.mp4")}
        print(f"undisturbed: {len(whole)} videos in {seconds:.1f} s")

        for processes in (1, 2):
            kills, starts, done = 0, 0, 0
            while kills < options.kills:
                out, begun = folder / f"{processes}-{starts}", 0
                while begun < len(PROMPTS) and kills < options.kills:
                    running, starts = [Started(out) for _ in range(processes)], starts + 1
                    time.sleep(rng.uniform(0, 1) * seconds)
                    kills += running[0].kill()
                    codes = [process.wait() for process in running]
                    assert codes[1:] == [0] * (processes - 1), codes  # the other process makes all videos
                    begun = check_done(out, whole)
                check_all(out, whole)
                done += 1
            print(
                f"{processes} at a time: {kills} kills in {starts} starts, {done} folders completed, every video right"
            )

        disk = folder / "disk"
        disk.mkdir()
        room = (
            sum(map(len, whole.values())) // 2 // 2**12 * 2**12 + 2**15
        )  # space for one video and a part of the next
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk]).returncode:
            print("full disk: not tried, no tmpfs can be mounted")
            return
        try:
            for file in ("prompts.txt", "config.json"):
                (disk / file).write_bytes((folder / file).read_bytes())
            (disk / "filler").write_bytes(bytes(2**14))
            code = Started(disk / "out").wait()
            print(f"full disk of {room} bytes: exit code {code}, {check_done(disk / 'out', whole)} done, all right")
            assert code == 1
            subprocess.run(["mount", "-o", "remount,size=64M", disk], check=True)
            check_all(disk / "out", whole)
            print("space again: the next start made all videos")
        finally:
            subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    main()
