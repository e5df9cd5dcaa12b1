"""Fresh processes, forked from one that has imported PyTorch and Diffusers but nothing of this project, so that those
seven seconds of imports happen once."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Nursery:
    """Runs scripts, each in a separate process and folder, with empty caches."""

    def __init__(self, **environment: str):
        self.caches = tempfile.TemporaryDirectory()
        caches = {"HF_HOME": f"{self.caches.name}/hub", "HF_MODULES_CACHE": f"{self.caches.name}/modules"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **caches, **environment},
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.caches.cleanup()

    def run(self, script: str, folder: Path) -> tuple[str, list[str]]:
        """Returns the script's output, and the lines on stderr that are not progress bars."""
        (folder / "script.py").write_text(script)
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        errors = (folder / "stderr").read_text()
        assert code == 0, f"{script}\n{errors}"
        said = [line for line in errors.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        return (folder / "stdout").read_text(), said


def run_here(folder: str) -> None:
    """In the child: run the script as `python script.py` does."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    for cache in (os.environ["HF_HOME"], os.environ["HF_MODULES_CACHE"]):
        shutil.rmtree(cache, ignore_errors=True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = 0
    try:
        exec(compile(Path("script.py").read_text(), "script.py", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = ""  # the script's folder, not this one

    import torch
    from diffusers import (  # noqa: F401
        AnyFlowFARPipeline,
        AutoencoderKLWan,
        DiffusionPipeline,
        FlowMatchLCMScheduler,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_here(line.strip())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
