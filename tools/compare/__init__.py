# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""`tokentrim compare`: methods and layouts on one checkpoint, with paired noise, measured and reported."""
