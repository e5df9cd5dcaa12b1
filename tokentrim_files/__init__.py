"""Files beside videos: states of a run, checkpoints, the code as one file."""
