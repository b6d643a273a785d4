"""A real single-node Kubernetes for development and tests, built from source and started without Docker."""
