"""Measures the 4-bit base: time and memory of its creation, and the savings of training from it."""
