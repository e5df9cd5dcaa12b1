# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Run an experiment, in parallel processes, and report it: `python -m research.evaluation.run --config research/evaluation/configs/x.yaml`.

Finished results are kept: start it again after an interrupt, or after adding methods or seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from .experiment import Experiment, part
from .report import write_report
from .rollouts import ROOT


def check_folder(out: Path, experiment: Experiment) -> None:
    """Refuse results of another experiment, and write the settings beside the results."""
    path, ours = out / "experiment.json", experiment.fingerprint()
    theirs = json.loads(path.read_text()) if path.exists() else {"arguments": {}}
    different = [name for name in ours if name != "arguments" and theirs.get(name, ours[name]) != ours[name]]
    different += [
        f"methods[{name!r}]"
        for name, arguments in ours["arguments"].items()
        if theirs["arguments"].get(name, arguments) != arguments
    ]
    if different:
        raise ValueError(f"{out} holds results with other settings ({', '.join(different)}): name another --out.")
    (out / "parts").mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**ours, "arguments": {**theirs["arguments"], **ours["arguments"]}}, indent=1))


def run_workers(config: Path, out: Path, experiment: Experiment, num_processes: int) -> None:
    """Run all jobs without results, in processes of `accelerate launch`."""
    jobs = [part(out, *job) for job in experiment.jobs()]
    missing = [path for path in jobs if not path.exists()]
    if not missing:
        return
    # Without a GPU, `accelerate launch` starts a single process; torchrun, which it wraps, starts all.
    launcher = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={num_processes}"]
    if torch.cuda.device_count() < 2:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "-m",
        "research.evaluation.worker",
        "--config",
        str(config),
        "--out",
        str(out),
    ]
    with (out / "workers.log").open("a") as log, tqdm(total=len(jobs), initial=len(jobs) - len(missing)) as progress:
        workers = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while workers.poll() is None:
                time.sleep(1)
                if new := sum(path.exists() for path in jobs) - progress.n:
                    progress.update(new)
        finally:
            workers.terminate()
        progress.update(sum(path.exists() for path in jobs) - progress.n)
    if left := sum(not path.exists() for path in jobs):
        raise RuntimeError(
            f"{left} of {len(jobs)} batches have no result, the workers ended with {workers.returncode}: "
            f"see {out / 'workers.log'}. Finished results are kept; start again to continue."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="an experiment, research/evaluation/configs/*.yaml")
    parser.add_argument("--out", type=Path, help="default: research/runs/<name of the experiment>")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or os.cpu_count())
    args = parser.parse_args()
    experiment = Experiment.load(args.config)
    out = (args.out or ROOT / "research" / "runs" / experiment.name).resolve()
    check_folder(out, experiment)
    run_workers(args.config.resolve(), out, experiment, args.processes)
    table = pd.concat([pd.read_csv(part(out, *job)) for job in experiment.jobs()], ignore_index=True)
    table.to_csv(out / "table.csv.gz", index=False, float_format="%.5g")
    print(write_report(table, experiment, out))


if __name__ == "__main__":
    main()
