"""What a run has reached: its state, its evaluations, its divergence. Pure."""
