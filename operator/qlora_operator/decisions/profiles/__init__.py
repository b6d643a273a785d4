"""Decides about QLoRAProfiles: their validity, and the GPU hours of namespaces."""
