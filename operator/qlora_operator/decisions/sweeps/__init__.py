"""What a sweep does next and what its status reports."""
