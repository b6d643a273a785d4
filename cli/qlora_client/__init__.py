"""Submits QLoRAJobs to a cluster and follows them, with the rights of the user who asks."""
