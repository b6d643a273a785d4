"""Batches, and the losses that training minimizes."""
