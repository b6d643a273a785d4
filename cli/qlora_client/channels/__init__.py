"""Moves channels to adapters: the decisions, the ConfigMap of their records, and the servers that follow it."""
