"""What every package may use: context, failures, records, files. No store, no model, no torch."""
