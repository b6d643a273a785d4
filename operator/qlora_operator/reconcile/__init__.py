"""One pass over a job or a sweep: read, decide, act, write the status once."""
