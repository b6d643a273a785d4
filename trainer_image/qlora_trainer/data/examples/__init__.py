"""Turns rows into examples: conversations, completions, texts, preferences."""
