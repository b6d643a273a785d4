"""What the watches show. Only this package imports kopf."""
