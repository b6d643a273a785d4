"""Jobs as users see them: their state, pods, logs, losses and comparison."""
