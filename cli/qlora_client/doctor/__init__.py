"""Whether a cluster is ready for QLoRAJobs: what is asked of it, and what follows from the answers."""
