# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""An experiment: methods x seeds on one checkpoint, read from a YAML file and checked before anything runs."""

import inspect
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import yaml

from research.training import world
from research.training.world import CHANGES
from tokentrim import TokenTrimPipeline

from .controls import CONTROLS
from .defects import DEFECTS
from .rollouts import CHECKPOINT, ROOT
from .worlds import WORLDS


DTYPES = ("float32", "bfloat16")
SCENES = ("static", *CHANGES)
ARGUMENTS = inspect.signature(TokenTrimPipeline.__call__).parameters


@dataclass(frozen=True)
class Experiment:
    """All settings that decide the numbers. Every method sees the same prompts and the same noise.

    Args:
        name (`str`): name of the file.
        methods (`dict[str, dict]`): arguments of the pipeline's call by name of the method; `config` adds those of
            `configs/<config>.json` first, `control` names a control of `research.evaluation.controls`. The others are
            compared with the first method.
        checkpoint (`str`): folder, relative to the repository; see `research.evaluation.worlds`.
        prompts_file (`str`, *optional*): prompts, one per line, relative to the repository, used in turn. For a
            checkpoint without a world: only measures that need no true video apply.
        dtype (`str`): dtype of transformer and VAE.
        first_seed, num_seeds (`int`): a seed fixes prompt and noise.
        num_chunks (`int`): length of the videos.
        batch_size (`int`): videos generated together.
        scenes (`list[str]`): what should change: `"static"` is only the place of the object. Tiny world only.
        defects (`list[str]`): kinds of defects to paint, one per video, in turn; none by default.
        defect_chunk (`int`): the accepted chunk into which they are painted.
        cases (`list[str]`, *optional*): methods whose best and worst videos the report shows; all by default.
    """

    name: str
    methods: dict[str, dict]
    checkpoint: str = str(CHECKPOINT.relative_to(ROOT))
    prompts_file: str | None = None
    dtype: str = "float32"
    first_seed: int = 1000
    num_seeds: int = 64
    num_chunks: int = 40
    batch_size: int = 8
    scenes: list[str] = field(default_factory=lambda: ["static"])
    defects: list[str] = field(default_factory=list)
    defect_chunk: int = 8
    cases: list[str] | None = None

    @classmethod
    def load(cls, path: Path) -> "Experiment":
        """Read and check a YAML file. `base` names a file beside it whose settings apply unless the file sets them."""
        settings = yaml.safe_load(path.read_text())
        if isinstance(settings, dict) and (base := settings.pop("base", None)) is not None:
            if not (path.parent / base).is_file():
                raise ValueError(f"{path}: `base` must be a file beside it, but is {base!r}.")
            settings = {**yaml.safe_load((path.parent / base).read_text()), **settings}
        known = set(cls.__dataclass_fields__) - {"name"}
        if not isinstance(settings, dict) or not settings.get("methods"):
            raise ValueError(f"{path} must be a mapping with `methods`, but is {settings!r}.")
        if unknown := set(settings) - known:
            raise ValueError(f"{path}: unknown settings {sorted(unknown)}; there are {sorted(known)}.")
        experiment = cls(name=path.stem, **settings)
        for name in ("first_seed", "num_seeds", "num_chunks", "batch_size", "defect_chunk"):
            value = getattr(experiment, name)
            if not isinstance(value, int) or value < (0 if name == "first_seed" else 1):
                raise ValueError(f"{path}: `{name}` must be a whole number, but is {value!r}.")
        if experiment.dtype not in DTYPES:
            raise ValueError(f"{path}: `dtype` must be one of {', '.join(DTYPES)}, but is {experiment.dtype!r}.")
        for name, valid in (("scenes", SCENES), ("defects", DEFECTS), ("cases", experiment.methods)):
            if unknown := set(getattr(experiment, name) or ()) - set(valid):
                raise ValueError(f"{path}: unknown {name} {sorted(unknown)}; there are {', '.join(valid)}.")
        if not (ROOT / experiment.checkpoint / "model_index.json").is_file():
            raise ValueError(f"{path}: `checkpoint` must be a pipeline's folder, but is {experiment.checkpoint!r}.")
        if experiment.world is not world and (experiment.defects or experiment.scenes != ["static"]):
            raise ValueError(f"{path}: `scenes` and `defects` work with the tiny world only.")
        if experiment.prompts_file is not None and not experiment.lines:
            raise ValueError(f"{path}: `prompts_file` must hold prompts, but {experiment.prompts_file!r} has none.")
        for method in experiment.methods:
            experiment.arguments(method)
        return experiment

    def arguments(self, method: str) -> dict:
        """The arguments of the call, without `control`."""
        settings = dict(self.methods[method] or {})
        control, config = settings.pop("control", None), settings.pop("config", None)
        if control is not None and control not in CONTROLS:
            raise ValueError(f"method {method!r}: unknown control {control!r}; there are {', '.join(CONTROLS)}.")
        path = ROOT / "configs" / f"{config}.json"
        if config is not None and not path.is_file():
            names = ", ".join(sorted(each.stem for each in path.parent.glob("*.json")))
            raise ValueError(f"method {method!r}: unknown config {config!r}; there are {names}.")
        settings = {**(json.loads(path.read_text()) if config else {}), **settings}
        if unknown := set(settings) - set(ARGUMENTS):
            raise ValueError(f"method {method!r}: the pipeline's call takes no {', '.join(sorted(unknown))}.")
        return settings

    def control(self, method: str) -> str | None:
        return (self.methods[method] or {}).get("control")

    @property
    def world(self) -> ModuleType | None:
        """The world of the checkpoint, by its folder's name. Other checkpoints count as tiny worlds, unless
        `prompts_file` is set."""
        return None if self.prompts_file else WORLDS.get(Path(self.checkpoint).name, world)

    @property
    def lines(self) -> list[str]:
        """The prompts of `prompts_file`; none if the file is missing."""
        path = ROOT / self.prompts_file
        return [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []

    def prompts(self, seeds: list[int]) -> list[str]:
        """A prompt for each seed, from the experiment's scenes or its file."""
        if self.prompts_file:
            lines = self.lines
            return [lines[seed % len(lines)] for seed in seeds]
        return sample_prompts(seeds, self.scenes, self.world)

    def jobs(self) -> list[tuple[str, list[int]]]:
        """The (method, seeds) of each batch, with methods alternating."""
        seeds = range(self.first_seed, self.first_seed + self.num_seeds)
        batches = [list(seeds[start : start + self.batch_size]) for start in range(0, len(seeds), self.batch_size)]
        return [(method, batch) for batch in batches for method in self.methods]

    def fingerprint(self) -> dict:
        """The settings that a folder of results must share; methods and seeds may be added."""
        free = ("methods", "num_seeds", "name", "cases")
        shared = {name: value for name, value in asdict(self).items() if name not in free}
        return {**shared, "arguments": {method: self.arguments(method) for method in self.methods}}


def sample_prompts(seeds: list[int], scenes: list[str] = ("static",), of: ModuleType = world) -> list[str]:
    """A prompt for each seed; by default from scenes in which only the object should change."""
    prompts = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scene = of.Scene.sample(generator)
        while of is world and (scene.change or "static") not in scenes:
            scene = of.Scene.sample(generator)
        prompts.append(scene.prompt)
    return prompts


def part(out: Path, method: str, seeds: list[int]) -> Path:
    """The file for the rows of a job. The middle frames of its chunks go beside it, as .npz."""
    return out / "parts" / f"{re.sub(r'[^a-z0-9.]+', '-', method.lower())}-{seeds[0]}-{seeds[-1]}.csv"
