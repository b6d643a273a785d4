"""The frozen 4-bit base: its layout, files, cache and loading."""
