"""GPU memory of a job, from its model's configuration."""
