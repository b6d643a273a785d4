"""Decides about QLoRAProfiles: whether they are valid, and whom they admit."""
