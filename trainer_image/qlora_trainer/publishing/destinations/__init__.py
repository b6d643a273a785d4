"""Where a finished folder may go. To add a kind, see `destination.Destination` and `addresses`."""
