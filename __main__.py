# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`python -m tokentrim`: the command `tokentrim`, also if its script is not on the PATH."""

import sys

from .tools.cli import main


if __name__ == "__main__":
    sys.exit(main())
