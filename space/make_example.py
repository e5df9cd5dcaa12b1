# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Make the finished run that the page shows first: the first example of the first world, seed 0.

python space/make_example.py
"""

import json
import shutil
import tempfile
from pathlib import Path

from runs import Settings, Studio

from tokentrim.tools.worlds import WORLDS


HERE = Path(__file__).resolve().parent


def main() -> None:
    name, world = next(iter(WORLDS.items()))
    studio = Studio(str(HERE.parent / "checkpoints" / name), world.chunks, name=f"checkpoints/{name}")
    settings = Settings(world.examples[0], 0, "plain", "tokentrim_plus", None, world.chunks)
    folder = HERE / "example"
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "example"
        for state in studio.roll_out(settings, made):
            print(f"chunk {state['made']} of {state['planned']}", end="\r", flush=True)
        (made / "state.json").write_text(json.dumps({**state, "is_example": True}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(made, folder)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
