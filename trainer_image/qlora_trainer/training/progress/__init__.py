"""The progress of a run: its state, evaluations and divergence. All pure."""
