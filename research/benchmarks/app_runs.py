# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Many runs of the page's server, one after another, a third of them aborted: its memory, threads, processes and files.

.venv-app/bin/python -m research.benchmarks.app_runs --runs 50

Each run is a separate visitor without a browser. One of three runs is aborted, in turn by the stop button and by a visitor
who leaves. Run it after `make app`, in its environment.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
WORLD, PROMPT = "tiny-world", "a red circle moving right over a blue background"


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """The server, as soon as it answers; its temporary files go to `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "space" / "app.py")], env=environment, stdout=log, stderr=log
        )
    for _ in range(240):
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}/"
        if process.poll() is not None:
            break
        time.sleep(0.5)
    raise RuntimeError(f"The server did not start:\n{(folder / 'server.log').read_text()}")


def visit(address: str, num_chunks: int, seed: int, end: str) -> int:
    """One run of one visitor; returns the number of finished chunks. `end` is "complete", "stop" or "leave"."""
    from gradio_client import Client

    client = Client(address, verbose=False)
    try:
        asked = [WORLD, PROMPT, seed, "plain", "tokentrim_plus", "", num_chunks, "", 0, "cut"]
        job = client.submit(*asked, api_name="/watch")
        if end != "complete":
            while not any(state.get("made") for state in job.outputs()) and not job.done():
                time.sleep(0.05)
        if end == "stop":
            client.predict(api_name="/stop")
        if end != "leave":
            return job.result()["made"]
        return job.outputs()[-1]["made"]
    finally:
        client.close()


def look(pid: int, folder: Path) -> dict:
    """Memory, threads, processes, files and folders of the server."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return {
        "MiB": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "children": sum(map(len, children)),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "folders": len(list(folder.glob("tokentrim-runs-*/*"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--chunks", type=int, default=6, help="of each run")
    parser.add_argument("--every", type=int, default=5, help="runs between two printed lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, address = start_server(Path(folder))
        try:
            print("  run       end  made      MiB  threads  children  files  folders")
            for run in range(options.runs):
                end = "complete" if run % 3 < 2 else ("stop", "leave")[run // 3 % 2]
                made = visit(address, options.chunks, run, end)
                if (run + 1) % options.every == 0 or run == 0:
                    time.sleep(2)  # time for the server to notice that the visitor left
                    held = look(process.pid, Path(folder))
                    print(
                        f"{run + 1:5}{end:>10}{made:6}{held['MiB']:9.1f}{held['threads']:9}{held['children']:10}"
                        f"{held['files']:7}{held['folders']:9}",
                        flush=True,
                    )
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
