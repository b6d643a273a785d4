"""The contract of the operator, the trainer and the command line: the resource, the records, the exit codes."""
