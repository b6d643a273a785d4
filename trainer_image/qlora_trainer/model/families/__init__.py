"""Supported models: inspection, a probe with a tiny model, and rejections."""
