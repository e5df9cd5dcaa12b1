# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What is compared: methods by name, prompts, seeds and a length, from options and a YAML file. No PyTorch here."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import check_code, check_parts, check_size, find_checkpoint
from ..jobs import check_inputs, check_settings, read_text
from ..names import LAYOUTS, METHODS, check_layout, check_method
from ..numbers import SEED, TOP, Number, whole
from ..worlds import WORLDS


REFERENCE = "plain"  # what the others are compared with, where it is compared itself
DEFAULTS = {"methods": ["plain", "tokentrim", "tokentrim_plus"], "layouts": [], "chunks": 60, "seeds": 4}
QUICK = {"chunks": 30, "seeds": 3}
QUICK_PROMPTS = 2
MAX_SEEDS = 1000  # of a prompt: seeds of the next prompt begin after them
NUMBERS = {
    "chunks": whole(2),
    "seeds": Number(True, f"an int from 1 to {MAX_SEEDS}", lambda number: 1 <= number <= MAX_SEEDS),
    "first_seed": SEED,
    "top": TOP,
    "batch": whole(1),
}
KEYS = ("checkpoint", "prompts", "methods", "layouts", "settings", "chunks", "seeds", "first_seed", "top", "batch")
DECIDED = ("num_frames", "num_videos_per_prompt", "output_type", "prompt_schedule")  # by the comparison itself


@dataclass(frozen=True)
class Video:
    """One video of one method.

    Args:
        method (`str`): its name in the plan.
        number (`int`): of its prompt.
        prompt (`str`): the text.
        seed (`int`): of its noise, which all methods share.
    """

    method: str
    number: int
    prompt: str
    seed: int

    @property
    def stem(self) -> str:
        """Its files, without ending, in the folder of the comparison."""
        return f"videos/{slug(self.method)}/{self.number:02}-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        checkpoint (`str`): folder or Hub id.
        methods (`dict[str, dict]`): arguments of the pipeline's call by name.
        prompts (`tuple[str, ...]`): texts.
        settings (`dict`): arguments of the call that all methods share.
        chunks (`int`): length of each video.
        seeds (`int`): videos of each prompt and method.
        first_seed (`int`): prompt n has the seeds from this + 1000 n on.
        top (`float`): share of the picture, from the top, whose drift is measured.
        batch (`int`, *optional*): videos that are generated together; by default as many as memory allows.
    """

    checkpoint: str
    methods: dict[str, dict]
    prompts: tuple[str, ...]
    settings: dict
    chunks: int
    seeds: int
    first_seed: int = 0
    top: float = 1.0
    batch: int | None = None

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return REFERENCE if REFERENCE in self.methods else next(iter(self.methods))

    def arguments(self, method: str) -> dict:
        """Of the call, but for prompt, length and noise."""
        return {**self.settings, **self.methods[method]}

    def videos(self, method: str) -> list[Video]:
        """All videos of a method: the first seed of every prompt comes first."""
        starts = [self.first_seed + MAX_SEEDS * number for number in range(len(self.prompts))]
        return [
            Video(method, number, prompt, starts[number] + seed)
            for seed in range(self.seeds)
            for number, prompt in enumerate(self.prompts)
        ]

    def batches(self, size: int) -> list[list[Video]]:
        """Videos that are generated together, methods in turn, so that a growing report compares all of them."""
        first = self.videos(self.reference)
        groups = [first[start : start + size] for start in range(0, len(first), size)]
        return [
            [Video(method, each.number, each.prompt, each.seed) for each in group]
            for group in groups
            for method in self.methods
        ]


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9_.]+", "-", name.lower()).strip("-.") or "-"


def read_plan(options: argparse.Namespace) -> Plan:
    """
    The plan of a command: options win over the file, which wins over the defaults.

    Raises:
        `OSError`, `ValueError`: something cannot be compared; the message names it and what is valid.
    """
    check_inputs({"--plan": options.plan, "--prompts": options.prompts})
    given = {} if options.plan is None else read_yaml(options.plan)
    given |= {name: value for name in KEYS if (value := getattr(options, name, None)) is not None}
    if given.get("checkpoint") is None:
        raise ValueError("CHECKPOINT is required, here or in --plan.")
    values = {**DEFAULTS, **(QUICK if options.quick else {}), **given}
    for name, number in NUMBERS.items():
        if values.get(name) is not None:
            number.check(name, values[name])
    methods = {**read_methods(values["methods"]), **read_layouts(values["layouts"])}
    settings = {**(values.get("settings") or {})}
    settings |= {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    check_methods(methods, settings)
    folder = find_checkpoint(values["checkpoint"])
    if folder is not None:
        check_parts(folder)
        check_code(folder, options.trust_remote_code)
        for each in (settings, *methods.values()):
            check_size(folder, each)
    world = None if folder is None else WORLDS.get(folder.resolve().name)
    prompts = read_prompts(given.get("prompts"), world)
    return Plan(
        str(values["checkpoint"]),
        methods,
        prompts[:QUICK_PROMPTS] if options.quick and given.get("prompts") is None else prompts,
        settings,
        values["chunks"],
        values["seeds"],
        values.get("first_seed") or 0,
        values.get("top") or (world.top if world else 1.0),
        values.get("batch"),
    )


SETTINGS = ("num_inference_steps", "height", "width", "guidance_scale")  # options that all methods share


def read_yaml(path: Path) -> dict[str, Any]:
    """
    A plan's file.

    Raises:
        `ValueError`: it is no mapping of known keys.
    """
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"--plan: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"--plan: {path} must be a mapping of {', '.join(KEYS)}.")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"--plan: {path} must have the keys {', '.join(KEYS)}, but has {key!r}.")
    if isinstance(content.get("prompts"), str):
        content["prompts"] = path.parent / content["prompts"]
        check_inputs({f"--plan: prompts of {path}": content["prompts"]})
    return content


def read_methods(methods: Any) -> dict[str, dict]:
    """Names, or a mapping of names to arguments of the call."""
    if isinstance(methods, Mapping):
        for name, arguments in methods.items():
            if not isinstance(arguments, dict):
                raise ValueError(f"`methods` must have arguments of the call for {name!r}, but has {arguments!r}.")
        return {str(name): dict(arguments) for name, arguments in methods.items()}
    check_list("methods", methods, METHODS)
    return {name: {"method": name} for name in methods}


def read_layouts(layouts: Any) -> dict[str, dict]:
    """Names of layouts, each compared with the plain method."""
    check_list("layouts", layouts, tuple(LAYOUTS))
    return {name: {"method": "plain", "layout": name} for name in layouts}


def check_list(name: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"`{name}` must be a list of names, {', '.join(known)}, but is {value!r}.")
    for each in value:
        (check_method if name == "methods" else check_layout)(f"`{name}`", each)


def check_methods(methods: dict[str, dict], settings: dict) -> None:
    """Refuse arguments that are invalid without a checkpoint, and names that would share a folder."""
    if not methods:
        raise ValueError("`methods` must name at least one method.")
    for arguments in (settings, *methods.values()):
        check_settings(arguments)
        if decided := [name for name in DECIDED if name in arguments]:
            raise ValueError(f"`{decided[0]}` is decided by the comparison: leave it out.")
    folders: dict[str, str] = {}
    for name in methods:
        other = folders.setdefault(slug(name), name)
        if other != name:
            raise ValueError(
                f"`methods` must have names that differ in letters or digits, but {other!r} and {name!r} do not."
            )


def read_prompts(given: Any, world: Any) -> tuple[str, ...]:
    """Those of a file or a list; or those of the checkpoint's world; or twelve that ship."""
    if given is None:
        if world is not None:
            return world.still
        given = Path(__file__).with_name("prompts.txt")
    lines = read_text(given).splitlines() if isinstance(given, Path) else given
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"`prompts` must be a file, or a list of texts, but is {given!r}.")
    prompts = tuple(dict.fromkeys(" ".join(line.split()) for line in lines if any(map(str.isalnum, line))))
    if not prompts:
        raise ValueError(f"`prompts` must have a prompt on each line, but no line of {given} has a word.")
    return prompts
