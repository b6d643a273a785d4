"""Clients of hubs, object stores and registries. They raise StepFailure only."""
