# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command `tokentrim` (`cli`, `commands`) and its subcommands. A run needs none of it."""
