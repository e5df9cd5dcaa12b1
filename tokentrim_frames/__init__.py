"""Latents to frames, frames to files, and pictures of a run."""
