"""Compares QLoRA with 16-bit fine-tuning by what the tuned models answer: tasks, arms, runs and their analysis."""
