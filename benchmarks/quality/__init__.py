"""Compares QLoRA with 16-bit fine-tuning by the tuned models' answers: tasks, arms, runs and their analysis."""
