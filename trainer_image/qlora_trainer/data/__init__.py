"""From a data set's address to packed sequences on disk."""
