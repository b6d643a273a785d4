"""Modules for every package: context, failures, records and files.

They load no store, no model and no torch.
"""
