"""The command line: `qlora plan` and `qlora run`."""
