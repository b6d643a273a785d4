"""Destinations of a finished folder. To add one, see `destination.Destination`.

Also `addresses`.
"""
