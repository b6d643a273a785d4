"""Compares this trainer with TRL and Unsloth on one GPU, or on a CPU with a tiny model."""
