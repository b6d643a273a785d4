"""Modules for every package: context, failures, records, files. Loads no torch."""
