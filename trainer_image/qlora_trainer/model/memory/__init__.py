"""GPU memory of a job, measured on its layers without data or a GPU."""
