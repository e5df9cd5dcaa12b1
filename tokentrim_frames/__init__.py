"""Latents to frames, frames to files, and looking at a run."""
