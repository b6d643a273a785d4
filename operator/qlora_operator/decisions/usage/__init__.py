"""The GPU seconds of a job, and the budget that bounds them."""
