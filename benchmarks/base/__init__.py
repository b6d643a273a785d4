"""Measures the 4-bit base: how fast it is made and in how much memory, and what training that starts from it saves."""
