"""What the operator, the trainer and the command line agree on: the resource, the records, the exit codes."""
