# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The words of the tiny world, for its menus; other checkpoints take free text."""

from typing import Any


COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle", "ring")
DIRECTIONS = ("left", "right", "up", "down", "diagonally")
OBJECTS = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
EXAMPLES = (
    "a red circle moving right over a blue background",
    "a yellow ring moving up over a purple background",
    "a white square moving diagonally over a green background",
    "a cyan triangle moving left over a red background while the background turns yellow",
)


def make_sentence(thing: str, direction: str, background: str) -> str:
    """The prompt of one object over one background."""
    return f"{with_article(thing)} moving {direction} over {with_article(background)} background"


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def is_tiny_world(tokenizer: Any) -> bool:
    """Whether a checkpoint knows only this language."""
    return tokenizer is not None and len(tokenizer) < 100 and not unknown_words(tokenizer, EXAMPLES[0])


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words without a token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    return [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]
