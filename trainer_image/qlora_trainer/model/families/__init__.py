"""Which models can be trained: inspection, a probe with a tiny model, and reasons for rejection."""
