"""Tokenizes rows on all cores into chunks on disk, and resumes."""
