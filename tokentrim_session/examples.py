# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Examples in the docstrings of the pipeline; they run from the folder of the project."""

from collections.abc import Callable
from typing import TypeVar

from diffusers.utils import replace_example_docstring


Function = TypeVar("Function", bound=Callable)

CALL_EXAMPLE = """
        Examples:

        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "checkpoints/tiny-world", custom_pipeline="./pipeline_tokentrim.py", trust_remote_code=True
        ... )
        >>> prompt = "a red circle moving right over a blue background"
        >>> generator = torch.Generator().manual_seed(0)
        >>> output = pipe(prompt, num_frames=60, method="tokentrim_plus", generator=generator)
        >>> print(output)
        20 chunks (5.0 s): 18 held, 0 trimmed, 0 quarantined

        >>> paths = output.save_video("circle.mp4")
        ```
"""

STREAM_EXAMPLE = """
        Examples:

        ```py
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "checkpoints/tiny-world", custom_pipeline="./pipeline_tokentrim.py", trust_remote_code=True
        ... )
        >>> with pipe.stream("a red circle moving right over a blue background", num_frames=None) as stream:
        ...     for chunk in stream:
        ...         print(chunk.index, chunk.frames.shape)
        ...         if chunk.index == 1:
        ...             stream.set_prompt("a green square moving left over a yellow background")
        ...         if chunk.index == 2:
        ...             break
        0 (1, 3, 64, 64, 3)
        1 (1, 3, 64, 64, 3)
        2 (1, 3, 64, 64, 3)
        ```
"""


def with_example(example: str) -> Callable[[Function], Function]:
    """Put an example into a docstring, as Diffusers does, and keep the signature visible to type checkers."""
    return replace_example_docstring(example)
