"""Turns rows into examples: conversations, prompts with completions, texts, preferences."""
