"""Jobs that are trained together."""
