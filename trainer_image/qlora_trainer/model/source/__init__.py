"""The files of a base model, and where they come from. Loads no torch."""
