# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The shipped worlds: what stays in each, and the words of its prompts; other checkpoints take free text."""

from dataclasses import dataclass
from typing import Any


COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle", "ring")
DIRECTIONS = ("left", "right", "up", "down", "diagonally")
OBJECTS = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
PACES, SIDES = ("slow", "fast"), ("left", "right")
GROUNDS, LIGHTS = ("plains", "hills", "mountains"), ("dawn", "noon", "dusk", "night")
PLACES = ("a mountain meadow", "rocky peaks", "a dandelion field", "a sunset", "paint brushes")


@dataclass(frozen=True)
class World:
    """A shipped world.

    Args:
        title (`str`): for the picker.
        words (`dict`): choices by the label of their list, in the order of the sentence.
        examples (`tuple[str, ...]`): prompts; the first is filled in.
        sentence (`str`): the prompt that the chosen words make, with a place for each.
        chosen (`tuple[str, ...]`): the words of the first example.
        top (`float`): share of the picture, from the top, that is meant to stay.
        chunks (`int`): a length at which the plain rollout visibly drifts.
    """

    title: str
    words: dict[str, tuple[str, ...]]
    examples: tuple[str, ...]
    sentence: str
    chosen: tuple[str, ...]
    top: float
    chunks: int

    @property
    def still(self) -> tuple[str, ...]:
        """The examples in which nothing is asked to change but places."""
        return tuple(example for example in self.examples if " while " not in example)

    def make_sentence(self, *words: str) -> str:
        """The prompt of the chosen words."""
        return with_articles(self.sentence.format(*words))


def with_articles(sentence: str) -> str:
    """`a orange ring` as `an orange ring`."""
    words = sentence.split()
    vowel = [after[0] in "aeiou" for after in [*words[1:], "x"]]
    return " ".join("an" if word == "a" and follows else word for word, follows in zip(words, vowel))


CIRCLES = {"Object": OBJECTS, "moves": DIRECTIONS, "over": COLORS}
OF_CIRCLES = (
    "a red circle moving right over a blue background",
    "a yellow ring moving up over a purple background",
    "a white square moving diagonally over a green background",
    "a cyan triangle moving left over a red background while the background turns yellow",
)
OVER_BACKGROUND, RED_CIRCLE = "a {} moving {} over a {} background", ("red circle", "right", "blue")
WORLDS = {  # by folder of checkpoints/; the first is shown
    "travelling-world": World(
        "A journey through landscapes",
        {"Pace": PACES, "to the": SIDES, "over": GROUNDS, "by": LIGHTS},
        (
            "a fast journey right over hills by noon",
            "a slow journey left over mountains by dusk",
            "a fast journey left over plains by dawn",
            "a slow journey right over hills by night",
        ),
        "a {} journey {} over {} by {}",
        ("fast", "right", "hills", "noon"),
        0.3,
        100,
    ),
    "photographs": World(
        "A camera over photographs",
        {"Pace": PACES, "to the": SIDES, "over": PLACES},
        (
            "a slow pan right over a mountain meadow",
            "a fast pan left over rocky peaks",
            "a slow pan left over a dandelion field",
            "a slow pan right over a sunset",
        ),
        "a {} pan {} over {}",
        ("slow", "right", "a mountain meadow"),
        1.0,
        60,
    ),
    "tiny-world": World("One shape over one color", CIRCLES, OF_CIRCLES, OVER_BACKGROUND, RED_CIRCLE, 1.0, 60),
    "tiny-world-self-forced": World(
        "One shape, trained as Self Forcing is", CIRCLES, OF_CIRCLES[:3], OVER_BACKGROUND, RED_CIRCLE, 1.0, 60
    ),
}


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words that the tokenizer has no token for."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    return [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]
