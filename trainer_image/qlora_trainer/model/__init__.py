"""The model: its support, loading, adapting, computing and merging."""
