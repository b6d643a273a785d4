"""The spec of a QLoRAJob: what a user writes."""
