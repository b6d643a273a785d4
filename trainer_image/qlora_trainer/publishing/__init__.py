"""A finished folder, and where it may go."""
