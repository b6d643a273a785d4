"""The model: whether it can be trained, loading, adapting, computing and merging it."""
