"""GPU memory of a job, measured on its model's layers without data and without a GPU."""
