"""Renders examples with the model's chat template into tokens and targets."""
