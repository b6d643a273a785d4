"""A plugin of vLLM that serves adapters of QLoRAJobs once they are verified."""
