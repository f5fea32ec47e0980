"""Reward functions: (response, answer, fields) -> a number. Found by entry point, or by dotted path."""
