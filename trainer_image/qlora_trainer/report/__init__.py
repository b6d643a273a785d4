"""What people and their tools see of a run."""
