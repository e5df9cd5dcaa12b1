# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim generate` as a script for launchers. The default checkpoint is the tiny world.

    python examples/generate.py "a red circle moving right over a blue background" --out circle.mp4
    accelerate launch examples/generate.py --prompts prompts.txt --out videos
    torchrun --nproc-per-node 2 examples/generate.py --prompts prompts.txt --out videos    # on CPUs

The package must be installed: `pip install .` in the clone.
"""

import sys
from pathlib import Path

from tokentrim.tools.cli import main


TINY_WORLD = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny-world"

if __name__ == "__main__":
    sys.exit(main(["generate", "--checkpoint", str(TINY_WORLD), *sys.argv[1:]]))
