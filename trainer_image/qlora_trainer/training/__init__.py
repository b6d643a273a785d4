"""Everything between the first and the last optimizer step."""
