"""Measures the rate of new jobs that the operator starts, and their cost."""
