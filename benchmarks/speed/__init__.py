"""Compares this trainer with TRL and with the original recipe, side by side on one machine."""
