"""Compares automatic settings with hand-tuned ones: tasks, arms, runs and their tables."""
