"""Clients of model hubs, object stores and registries. Each raises StepFailure only."""
