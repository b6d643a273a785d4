"""Evaluates adapters: held-out losses, and answers that a program checks."""
