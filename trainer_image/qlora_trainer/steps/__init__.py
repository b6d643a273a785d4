"""The steps of a job: prepare, train, publish, clean."""
