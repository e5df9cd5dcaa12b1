# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The pipeline and its rooms as one file, for saved folders, the Hub and `examples/community` of Diffusers."""

import ast
import sys
from collections import Counter
from pathlib import Path


MARK = "made of the modules of TokenTrim for Diffusers by `tokentrim bundle`"
HEADER = f'''# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim (arXiv 2602.00268) for causal video diffusion models: long video that does not fall apart.

One file, {MARK}: change those.

    pipe = DiffusionPipeline.from_pretrained(checkpoint, custom_pipeline="tokentrim", trust_remote_code=True)
    output = pipe("a red fox trots through snow", num_frames=249)
"""
'''


def bundle(pipeline: Path) -> str:
    """
    The source of the pipeline and of every module that it needs, as one file.

    Args:
        pipeline (`Path`): `pipeline_tokentrim.py` beside its rooms, or a bundle, which is returned unchanged.

    Raises:
        `RuntimeError`: two modules define the same name.
    """
    if is_bundle(pipeline):
        return pipeline.read_text()
    modules = [split_module(path) for path in sort_modules(pipeline)]
    counts = Counter(name for _, _, defined in modules for name in defined)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise RuntimeError(f"One file can define a name only once, but two modules define {twice}.")
    imports = merge_imports([node for nodes, _, _ in modules for node in nodes])
    return "\n\n\n".join([f"{HEADER}\n{imports}", *(text for _, text, _ in modules)]) + "\n"


def is_bundle(path: Path) -> bool:
    return path.is_file() and MARK in path.read_text(errors="replace")[:1000]


def sort_modules(path: Path, sorted_: list[Path] | None = None) -> list[Path]:
    """Sort the modules that a module needs: each comes after those that it imports.

    Args:
        path (`Path`): the module, which comes last.
        sorted_ (`list[Path]`, *optional*): modules that are sorted already; the others are appended.
    """
    sorted_ = [] if sorted_ is None else sorted_
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    imported = {path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py") for node in nodes}
    for module in sorted(imported):
        if module not in sorted_:
            sort_modules(module, sorted_)
    sorted_.append(path)
    return sorted_


def is_import(node: ast.stmt) -> bool:
    """Whether a statement only imports; a `try` around imports, which reports old versions, counts as one."""
    if isinstance(node, ast.Try):
        return all(map(is_import, node.body))
    return isinstance(node, (ast.Import, ast.ImportFrom))


def split_module(path: Path) -> tuple[list[ast.stmt], str, list[str]]:
    """Split a module into imports from other packages, the rest, and the names that it defines."""
    source = path.read_text()
    docstring, *nodes = ast.parse(source).body
    lines = source.splitlines()
    imports = [node for node in nodes if is_import(node)]
    for node in (docstring, *imports):
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    text = "\n".join(line for line in lines[1:] if line is not None).strip()  # the first line is the copyright
    defined = [target for node in nodes if node not in imports for target in defined_names(node)]
    flat = [each for node in imports for each in (node.body if isinstance(node, ast.Try) else [node])]
    return [node for node in flat if not getattr(node, "level", 0)], text, defined


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def merge_imports(nodes: list[ast.stmt]) -> str:
    """Merge imports: each module once, in the order of isort."""
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
