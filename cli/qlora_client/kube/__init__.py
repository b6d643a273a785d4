"""Access to the API server. Only this package imports the Kubernetes client."""
