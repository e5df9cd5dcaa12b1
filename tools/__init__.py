# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a run does not need: the command `tokentrim` (`cli`, `commands`) and what its subcommands do."""
