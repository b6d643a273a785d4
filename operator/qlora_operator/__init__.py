"""The operator: gather, plan, act, write the status once."""
