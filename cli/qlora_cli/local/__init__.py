"""The commands that need no cluster: plan, data and run."""
