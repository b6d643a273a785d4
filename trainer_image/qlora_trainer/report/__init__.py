"""Reports of a run for people and their tools."""
