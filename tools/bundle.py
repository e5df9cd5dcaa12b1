# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The pipeline and its companions as one file, for `examples/community` of Diffusers."""

import ast
import os
import sys
from collections import Counter
from pathlib import Path

from diffusers.utils.dynamic_modules_utils import get_relative_imports

from ..tokentrim_checks import check


ROOT = Path(__file__).parent.parent  # of the package
MARK = "made of the modules of TokenTrim for Diffusers by `tokentrim bundle`"
HEADER = f'''# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim (arXiv 2602.00268) for causal video diffusion models: long video that does not fall apart.

One file, {MARK}: change those.

    pipe = DiffusionPipeline.from_pretrained(checkpoint, custom_pipeline="tokentrim", trust_remote_code=True)
    output = pipe("a red fox trots through snow", num_frames=249)
"""
'''


def sort_modules(name: str) -> list[str]:
    """A module after all those that it imports."""
    needed = [each for module in sorted(get_relative_imports(ROOT / f"{name}.py")) for each in sort_modules(module)]
    return list(dict.fromkeys([*needed, name]))


def is_import(node: ast.stmt) -> bool:
    """Whether it imports and does nothing else; a `try` around imports tells of old versions."""
    if isinstance(node, ast.Try):
        return all(map(is_import, node.body))
    return isinstance(node, (ast.Import, ast.ImportFrom))


def split_module(name: str) -> tuple[list[ast.stmt], str, list[str]]:
    """Imports from other packages, the rest of the text, and what that defines."""
    source = (ROOT / f"{name}.py").read_text()
    docstring, *nodes = ast.parse(source).body
    lines = source.splitlines()
    imports = [node for node in nodes if is_import(node)]
    for node in (docstring, *imports):
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    text = "\n".join(line for line in lines[1:] if line is not None).strip()  # the first line is the copyright
    defined = [target for node in nodes if node not in imports for target in names_of(node)]
    flat = [each for node in imports for each in (node.body if isinstance(node, ast.Try) else [node])]
    return [node for node in flat if not getattr(node, "level", 0)], text, defined


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines at the top of its module."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    return [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]


def merge_imports(nodes: list[ast.stmt]) -> str:
    """Each module once, in the order of isort."""
    whole, parts = set(), {}
    for node in nodes:
        if isinstance(node, ast.Import):
            whole |= {ast.unparse(ast.Import([alias])) for alias in node.names}
        else:
            parts.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
    sections = []
    for of_python in (True, False):
        section = sorted((line for line in whole if of_python == is_of_python(line.split()[1])), key=str.lower)
        for module in sorted(filter(lambda module: of_python == is_of_python(module), parts), key=str.lower):
            names = sorted(parts[module], key=lambda name: (not name.isupper(), not name[0].isupper(), name.lower()))
            line = f"from {module} import {', '.join(names)}"
            if len(line) > 119:
                line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
            section.append(line)
        sections.append("\n".join(section))
    return "\n\n".join(sections)


def is_of_python(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


def bundle() -> str:
    """
    The source of the file.

    Raises:
        `RuntimeError`: two modules define the same name.
    """
    modules = [split_module(name) for name in sort_modules("pipeline_tokentrim")]
    counts = Counter(name for _, _, defined in modules for name in defined)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise RuntimeError(f"One file can define a name once only, but these are defined in two modules: {twice}.")
    imports = merge_imports([node for nodes, _, _ in modules for node in nodes])
    return "\n\n\n".join([f"{HEADER}\n{imports}", *(text for _, text, _ in modules)]) + "\n"


def write_bundle(path: Path) -> None:
    """
    Write the file, whole or not at all.

    Raises:
        `ValueError`: it would take the place of a file that is none of ours, or of the package when Python imports it.
    """
    ours = path.is_file() and MARK in path.read_text(errors="replace")[:1000]
    check(ours or not path.exists(), "FILE", str(path), "a new file, or one that `tokentrim bundle` wrote")
    importable = {Path.cwd(), *(Path(folder).resolve() for folder in sys.path)}
    shadows = path.stem == __name__.partition(".")[0] and path.parent.resolve() in importable
    valid = "of another name or in another folder: there Python would import it in the place of the package"
    check(not shadows, "FILE", str(path), valid)
    source = bundle()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(source)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
