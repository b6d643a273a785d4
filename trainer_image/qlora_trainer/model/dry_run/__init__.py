"""A training step of a model's real layers on CUDA tensors without data: what it takes of a GPU's memory."""
