# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""VBench (https://github.com/Vchitect/VBench): generate videos of its prompts, score them, and compute its totals.

    python -m research.evaluation.vbench generate --methods research/evaluation/configs/change.yaml --out runs/vbench
    python -m research.evaluation.vbench score runs/vbench/*/
    python -m research.evaluation.vbench table runs/vbench/*/

Scores come from the package `vbench` in another environment: see research/README.md. Finished videos and scores are kept.
`accelerate launch -m research.evaluation.vbench generate` uses several processes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tokentrim.tokentrim_policies.registry import DEFAULT_METHOD
from tokentrim.tools.generate import Job, generate_missing

from .experiment import ARGUMENTS, Experiment
from .rollouts import CHECKPOINT, ROOT
from .vbench_scores import DIMENSIONS, QUALITY, table


MODES = ("vbench_standard", "custom_input", "long_vbench_standard", "long_custom_input")  # as VBench calls them
CUSTOM = tuple(QUALITY)  # do not ask for VBench's prompts; all but temporal_flickering are documented as such
# Programs for the other python. `vbench evaluate` does the same as SCORE, but only on GPUs.
LOCATE = "from importlib.util import find_spec; print(find_spec('vbench').submodule_search_locations[0])"
FILTER = "from vbench.cli.vbench import main; main()"
SCORE = (
    "import sys, torch, vbench; device, info, out, videos, dimension, mode = sys.argv[1:]; "
    "vbench.VBench(torch.device(device), info, out).evaluate(videos, dimension, dimension_list=[dimension], mode=mode)"
)
# VBench-Long takes the ending of its videos from the first entry of os.listdir, which may be the folder of its clips:
# sort videos first.
LONG = (
    "import os, runpy, sys; listdir = os.listdir; sys.argv = sys.argv[1:]; "
    "os.listdir = lambda path='.': sorted(listdir(path), key=lambda name: not str(name).endswith('.mp4')); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def read_prompts(python: Path) -> list[dict]:
    """Read VBench's prompts and their dimensions from the package of `python`."""
    located = None
    if python.is_file():
        located = subprocess.run([python, "-I", "-c", LOCATE], capture_output=True, text=True)
    if located is None or located.returncode:
        raise FileNotFoundError(
            f"--python must be the python of an environment with the package vbench, but '{python}' "
            f"{'has no vbench' if located else 'is not there'}. research/README.md says how to make one."
        )
    return json.loads((Path(located.stdout.strip()) / "VBench_full_info.json").read_text())


def write_whole(path: Path, content: dict) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


# Generating


def read_methods(files: list[Path]) -> dict[str, dict]:
    """Read the arguments of the call by method: a JSON file is one method with the file's name; a YAML experiment has
    several."""
    methods = {}
    for file in files:
        if file.suffix == ".json":
            found = {file.stem: json.loads(file.read_text())}
        else:
            experiment = Experiment.load(file)
            if controls := [method for method in experiment.methods if experiment.control(method)]:
                raise ValueError(f"--methods: {file} has controls, which only experiments can run: {controls}.")
            found = {method: experiment.arguments(method) for method in experiment.methods}
        for method, arguments in found.items():
            if unknown := set(arguments) - set(ARGUMENTS):
                raise ValueError(f"--methods: {file}: the pipeline's call takes no {', '.join(sorted(unknown))}.")
            if method in methods or "/" in method:
                raise ValueError(f"--methods: {method!r} of {file} must be a folder's name, and no other method's.")
            methods[method] = {"method": DEFAULT_METHOD, **arguments}  # overrides the checkpoint's method
    return methods


def list_jobs(options: argparse.Namespace, prompts: list[dict], methods: dict[str, dict]) -> list[Job]:
    """Generate video by video. A video has the same seed in all methods, whatever part of the videos is selected."""
    texts = [prompt["prompt_en"] for prompt in prompts]
    if options.rewritten is not None:
        texts = options.rewritten.read_text().splitlines()
        if len(texts) != len(prompts):
            raise ValueError(f"--rewritten: {options.rewritten} has {len(texts)} lines for {len(prompts)} prompts.")
    counts = {}  # videos by number of the prompt
    for dimension in options.dimensions:
        numbers = [number for number, prompt in enumerate(prompts) if dimension in prompt["dimension"]]
        for number in numbers[: options.prompts]:
            count = options.videos or (25 if dimension == "temporal_flickering" else 5)
            counts[number] = max(count, counts.get(number, 0))
    jobs = {}
    for number, count in sorted(counts.items()):
        for index in range(count):
            for method, arguments in methods.items():
                path = options.out / method / f"{prompts[number]['prompt_en']}-{index}.mp4"
                seed = options.seed + index * len(prompts) + number
                jobs.setdefault(path, Job(texts[number], seed, path, arguments))  # VBench lists two prompts twice
    return list(jobs.values())


def generate(options: argparse.Namespace) -> int:
    methods = read_methods(options.methods)
    if options.num_frames is not None:
        methods = {method: {**arguments, "num_frames": options.num_frames} for method, arguments in methods.items()}
    jobs = list_jobs(options, read_prompts(options.python), methods)

    settings = {name: str(getattr(options, name)) for name in ("checkpoint", "seed", "fps", "dtype", "rewritten")}
    path = options.out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else {**settings, "methods": {}}
    different = [name for name, value in settings.items() if before[name] != value]
    different += [name for name, value in methods.items() if before["methods"].get(name, value) != value]
    if different:
        raise ValueError(f"--out: {options.out} has videos of other settings ({', '.join(different)}): name another.")
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, {**settings, "methods": {**before["methods"], **methods}})
    return generate_missing(jobs, options.checkpoint, options.dtype, options.fps)


# Scoring


def commands(work: Path, dimension: str, filtered: bool, options: argparse.Namespace) -> list[list]:
    """Command lines that write VBench's scores of `work/videos` to `work/results`."""
    python, videos = options.python.absolute(), work / "videos"
    if options.mode.startswith("long"):  # as VBench's evaluate_long.sh does it
        script = options.repository.resolve() / "vbench2_beta_long" / "eval_long.py"
        command = [python, "-u", "-c", LONG, script, "--dev_flag", "--mode", options.mode, "--dimension", dimension]
        command += ["--videos_path", videos, "--full_json_dir", work / "info.json", "--output_path", work / "results"]
        return [[*command, *["--static_filter_flag"] * filtered]]
    before = []
    if filtered:
        before = [[python, "-Iu", "-c", FILTER, "static_filter", "--videos_path", videos, "--result_path", work]]
        videos = work / "filtered_videos"
    command = [python, "-Iu", "-c", SCORE, options.device, work / "info.json", work / "results", videos]
    return [*before, [*command, dimension, options.mode]]


def score_dimension(folder: Path, dimension: str, prompts: list[dict], options: argparse.Namespace) -> None:
    """Write the score, its videos and VBench's result for each to `vbench/<dimension>.json` in the folder."""
    custom, long = "custom" in options.mode, options.mode.startswith("long")
    filtered = dimension == "temporal_flickering" and options.static_filter and not custom
    prompts = [] if custom else [prompt for prompt in prompts if dimension in prompt["dimension"]]
    indices = range(25 if filtered and not long else 5)  # VBench keeps the first 5 still ones
    names = dict.fromkeys(f"{prompt['prompt_en']}-{index}.mp4" for prompt in prompts for index in indices)
    names = sorted(path.name for path in folder.glob("*.mp4")) if custom else list(names)
    there = [name for name in names if (folder / name).is_file()]
    if not there or len(there) < len(names) and not options.partial:
        missing = next((name for name in names if name not in there), "*.mp4")
        raise FileNotFoundError(
            f"{dimension}: {folder} has {len(there)} of {len(names)} videos, for example no {missing!r}. Generate the "
            "others, or score part of them with --partial."
        )
    path = folder / "vbench" / f"{dimension}.json"
    request = {"mode": options.mode, "videos": len(there), "of": len(names), "static_filter": filtered}
    if path.is_file() and request.items() <= json.loads(path.read_text()).items():
        return
    path.parent.mkdir(exist_ok=True)
    log = path.with_suffix(".log")
    # VBench needs a folder with videos only, and VBench-Long leaves its clips in it.
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent.resolve()) as work, log.open("w") as output:
        work = Path(work)
        (work / "videos").mkdir()
        for number, name in enumerate(there):  # VBench-Long splits names at underscores
            (work / "videos" / (f"{number:05}.mp4" if custom else name)).symlink_to((folder / name).resolve())
        (work / "info.json").write_text(json.dumps(prompts))
        environment = {**os.environ, "PYTHONPATH": str(options.repository.resolve())} if long else None
        for command in commands(work, dimension, filtered, options):
            ended = subprocess.run(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT)
            if ended.returncode:
                break
        found = [json.loads(each.read_text())[dimension] for each in work.glob("results/*_eval_results.json")]
    if not found or not math.isfinite(found[0][0]):
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
        raise RuntimeError(
            f"{dimension}: no score of {folder}. vbench ended with {ended.returncode}, and {log} with {last!r}. The "
            f"weights of this dimension: {DIMENSIONS[dimension].needs}. vbench downloads missing files to "
            "~/.cache/vbench ($VBENCH_CACHE_DIR) by default; without a network, put them there."
        )
    value, results = found[0][:2]
    write_whole(path, {"dimension": dimension, "score": value, **request, "names": there, "results": results})


def score(options: argparse.Namespace) -> int:
    prompts, failures = read_prompts(options.python), 0
    for folder in options.folders:
        for dimension in options.dimensions:
            try:
                score_dimension(folder, dimension, prompts, options)
            except (OSError, RuntimeError) as error:  # score the other dimensions
                failures += 1
                print(error, file=sys.stderr)
    return failures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--python", type=Path, default=ROOT / ".venv-vbench/bin/python", help="python of VBench's environment"
    )
    shared.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, help="all by default", metavar="DIMENSION")

    task = tasks.add_parser("generate", parents=[shared], help="videos of VBench's prompts")
    task.add_argument("--methods", nargs="+", type=Path, required=True, metavar="FILE", help=read_methods.__doc__)
    task.add_argument("--out", type=Path, required=True, help="output folder, with a folder for each method")
    task.add_argument("--checkpoint", default=str(CHECKPOINT), help="folder or Hub id")
    task.add_argument("--prompts", type=int, help="only the first ones of each dimension")
    task.add_argument("--videos", type=int, help="of each prompt (default: 5, and 25 for temporal_flickering)")
    task.add_argument(
        "--rewritten", type=Path, help="a file with a longer text for each prompt, one per line; names stay VBench's"
    )
    task.add_argument("--num-frames", type=int, help="of each video (default: the method's, or 81)")
    task.add_argument("--seed", type=int, default=0)
    task.add_argument("--fps", type=float, default=16)
    task.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")

    task = tasks.add_parser("score", parents=[shared], help="VBench's scores of folders of videos")
    task.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    task.add_argument("--mode", default=MODES[0], choices=MODES, help="custom: any videos; long: from 5 seconds on")
    task.add_argument("--repository", type=Path, help="clone of VBench, for the long modes")
    task.add_argument("--partial", action="store_true", help="score a part of the videos; it enters no total")
    task.add_argument("--no-static-filter", dest="static_filter", action="store_false", help="for temporal_flickering")
    task.add_argument("--device", default="cuda")

    task = tasks.add_parser("table", help="Markdown, with VBench's totals")
    task.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder that was scored, or JSON of scores")

    options = parser.parse_args(arguments)
    if options.task == "score":
        valid = CUSTOM if "custom" in options.mode else tuple(DIMENSIONS)
        options.dimensions = options.dimensions or valid
        if unfit := set(options.dimensions) - set(valid):
            parser.error(f"--dimensions: {sorted(unfit)} need VBench's prompts; --mode {options.mode} has {valid}")
        if options.mode.startswith("long"):
            script = Path("vbench2_beta_long", "eval_long.py")
            if options.repository is None or not (options.repository / script).is_file():
                parser.error(
                    f"--repository must be a clone of https://github.com/Vchitect/VBench for --mode {options.mode} "
                    f"(the package comes without VBench-Long's configs), but {options.repository} has no {script}"
                )
    elif options.task == "generate":
        options.dimensions = options.dimensions or tuple(DIMENSIONS)
        for name in ("prompts", "videos", "num_frames"):
            if (value := getattr(options, name)) is not None and value < 1:
                parser.error(f"--{name.replace('_', '-')} must be at least 1, but is {value}")
    return options


def main() -> None:
    options = parse()
    if options.task == "table":
        print(table(options.paths))
    else:
        sys.exit({"generate": generate, "score": score}[options.task](options) > 0)


if __name__ == "__main__":
    main()
