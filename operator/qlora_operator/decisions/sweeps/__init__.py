"""Decisions about a sweep, its pods and its status."""
