"""Searches for what the heads of a model need, from calls that were captured in it."""
