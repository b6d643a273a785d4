"""The commands that ask a cluster."""
