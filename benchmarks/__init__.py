"""Measures the trainer: speed and memory next to other trainers, the loop's overhead, and a profile."""
