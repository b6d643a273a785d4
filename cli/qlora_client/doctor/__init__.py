"""Checks whether a cluster is ready for QLoRAJobs: requests, and conclusions from the answers."""
