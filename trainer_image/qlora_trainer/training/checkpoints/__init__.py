"""Checkpoints and attempts on disk, and the run that they belong to."""
