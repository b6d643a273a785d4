"""Routed experts of a mixture, frozen in 4-bit stacks."""
