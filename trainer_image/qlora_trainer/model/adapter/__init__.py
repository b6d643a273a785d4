"""The LoRA adapter: attaching, initializing, checking and merging it."""
