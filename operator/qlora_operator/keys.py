"""Keys of the work queue."""

Key = tuple[str, str]
"""Namespace and name of a QLoRAJob."""
