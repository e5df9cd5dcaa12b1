"""What is written to disk beside videos: states of a run, checkpoints, the code as one file."""
