"""The contract of operator, trainer and command line.

It has the resources, the records and the exit codes.
"""
