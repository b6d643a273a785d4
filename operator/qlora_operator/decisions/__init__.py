"""Pure decisions: what is observed goes in, the plan, the manifests and the status come out."""
