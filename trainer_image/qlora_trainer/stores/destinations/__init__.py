"""Destinations of a finished folder: see `destination.Destination`, `addresses`."""
