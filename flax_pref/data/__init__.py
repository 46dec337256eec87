"""Preference pairs: reading, writing, encoding."""
