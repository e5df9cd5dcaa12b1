# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Folders that are ready for the Hub: the code of the pipeline, or the code and a checkpoint, with a model card.

The code is one file, the bundle: modules in folders do not load from the Hub.

A card consists of `model_card.md` and the `card_*.md` beside it. Only the card of the code alone has the measurements on this
project's toy model, because they say nothing about other weights.
"""

import json
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .. import __version__
from ..tokentrim_checks import check
from ..tokentrim_files.checkpoint import INDEX, name_classes, write_code
from .bundle import PIPELINE
from .copying import check_links
from .folders import check_new_folder, new_folder


ROOT = Path(__file__).parent.parent  # of the package
PAGES = Path(__file__).parent  # that cards are made of
ENTRY = '''# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What Diffusers reads where `custom_pipeline` is this repository."""

from .pipeline_tokentrim import TokenTrimPipeline  # noqa: F401
'''
TAGS = ["diffusers", "video-generation", "long-video", "wan", "causal", "kv-cache", "tokentrim", "arxiv:2602.00268"]


def publish(
    repo_id: str,
    out: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    license: str | None = None,
    revision: str = f"v{__version__}",
    prompt: str = "a red fox trots through snow",
) -> ModelCard:
    """
    Write a folder that is ready for `hf upload`. It appears when it is complete; a failure leaves nothing behind.

    Args:
        repo_id (`str`): the repository that the card's snippet loads, `"you/name"`.
        out (`str` or `os.PathLike`): the folder to write, new or empty.
        checkpoint (`str` or `os.PathLike`, *optional*):
            A Diffusers folder of a causal Wan model, whose files are copied unchanged. By default, only code.
        license (`str`, *optional*):
            The Hub's name of the license of the weights. By default, that of the checkpoint's card.
        revision (`str`, *optional*): the tag that the card's snippet pins. By default, this version.
        prompt (`str`, *optional*): a prompt for the snippet.

    Returns:
        `ModelCard`: the card, as written to README.md.

    Raises:
        `ValueError`: an argument is invalid; the message names it, its value and the valid values.
    """
    out = Path(out)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` must be a name like 'you/name', but is {repo_id!r}: {error}") from error
    check("/" in repo_id, "repo_id", repo_id, "a name like 'you/name'")
    check_new_folder(out)
    body = None
    if checkpoint is None:
        check(license in (None, "apache-2.0"), "license", license, "None or 'apache-2.0' for the code alone")
        license = "apache-2.0"
    else:
        checkpoint = Path(checkpoint)
        check((checkpoint / INDEX).is_file(), "checkpoint", str(checkpoint), f"a folder with a {INDEX}")
        check_links("checkpoint", checkpoint)
        if (checkpoint / "README.md").is_file():
            own_card = ModelCard.load(checkpoint / "README.md")
            license, body = license or own_card.data.license, nested(own_card.text)
        check(license is not None, "license", license, f"given, since {checkpoint} has no card that says it")

    card = ModelCard.from_template(
        ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", license=license, tags=TAGS),
        template_str=(PAGES / "model_card.md").read_text(),
        title=repo_id.split("/")[1],
        repo_id=repo_id,
        revision=quoted(revision),
        prompt=quoted(prompt),
        checkpoint=checkpoint,
        license=license,
        body=body,
        results=(PAGES / "card_results.md").read_text().strip() if checkpoint is None else None,
        limits=(PAGES / "card_limits.md").read_text().strip(),
    )
    with new_folder(out) as folder:
        if checkpoint is not None:
            shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(".*", "*.py"), dirs_exist_ok=True)
        write_code(folder, PIPELINE)
        (folder / "pipeline.py").write_text(ENTRY)
        shutil.copy(ROOT / "LICENSE", folder)
        if checkpoint is not None:
            name_classes(folder, None)
        card.save(folder / "README.md")
    return card


def quoted(text: str) -> str:
    """As Python has it, on one line, in UTF-8."""
    return json.dumps(text, ensure_ascii=False).encode(errors="backslashreplace").decode()


def nested(text: str) -> str:
    """The text of another card, below a heading of this one."""
    text = re.sub(r"\A\s*# .*\n", "", text)
    return unlinked(re.sub(r"^(#+ )", r"#\1", text, flags=re.M).strip())


def unlinked(text: str) -> str:
    """Without pictures and links that do not come along, and without what stands in parentheses for such a link alone."""
    link = r"\[([^\]]*)\]\((?!https?:)[^)]*\)"
    text = re.sub(rf"^!{link}\n+", "", text, flags=re.M)
    return re.sub(link, r"\1", re.sub(rf"\s*\({link}\)", "", text))
