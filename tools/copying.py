# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Folders of other people, copied: links lead nowhere outside them, and weights get the names that libraries look for."""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .original import require


def check_links(name: str, folder: Path) -> None:
    """
    Refuse a checkpoint with links out of it, which would be copied as if they were its own files.

    Links into the checkpoint, and those of the Hub's cache into its store of files, are followed.

    Args:
        name (`str`): of the argument, for the message.
        folder (`Path`): the checkpoint.

    Raises:
        `ValueError`: a link leads out of it, in a circle or nowhere, or an entry is neither a file nor a folder.
    """
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    valid = "a folder of its own files, whose links stay inside it"
    for path in walk(root):
        target = Path(os.path.realpath(path))
        kind = target.stat().st_mode if target.exists() else 0
        inside = any(home == target or home in target.parents for home in homes) and target not in path.parents
        given = f"{path} is {f'a link to {target}' if path.is_symlink() else 'neither a file nor a folder'}"
        require(inside and (stat.S_ISREG(kind) or stat.S_ISDIR(kind)), name, valid, given)


def walk(root: Path) -> Iterator[Path]:
    """All entries of a folder; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, entry) for entry in (*folders, *files))


def copy_part(source: Path, target: Path, stem: str | None = None, ignore: Sequence[str] = (".*",)) -> None:
    """
    Copy a component of a checkpoint, without hidden files. Where it only has weights of a variant, `model.fp16.safetensors`,
    they get the name without it.

    Args:
        source (`Path`): its folder, see [`check_links`].
        target (`Path`): a new folder.
        stem (`str`, *optional*): name of its weights, `"model"` or `"diffusion_pytorch_model"`. By default, it has none.
        ignore (`Sequence[str]`): patterns of names that are left out.
    """
    names = {} if stem is None else name_weights(source, stem)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*ignore), copy_function=renaming(names))


def renaming(names: dict[str, str]) -> Callable[[str, str], object]:
    def copy(source: str, target: str) -> object:
        folder, name = os.path.split(target)
        return shutil.copy2(source, os.path.join(folder, names.get(name, name)))

    return copy


def name_weights(folder: Path, stem: str) -> dict[str, str]:
    """
    The names that weights get where they are of a variant: of one file, or of the index of sharded ones.

    Raises:
        `ValueError`: there are weights of several variants, or none that libraries would look for.
    """
    standard = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    if any((folder / name).is_file() for name in standard):
        return {}
    single, index = (
        rf"{re.escape(stem)}\.(?!.*-\d+-of-\d+)[\w-]+\.safetensors",
        rf"{re.escape(stem)}\.safetensors\.index\.[\w-]+\.json",
    )
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    variants = {name: standard[0] for name in files if re.fullmatch(single, name)}
    variants |= {name: standard[1] for name in files if re.fullmatch(index, name)}
    given = f"{folder} has {', '.join(variants) or 'none'}"
    require(len(variants) == 1, "base", f"a folder with {standard[0]} or {standard[1]}, or one variant of it", given)
    return variants
