"""Searching and training what methods take from a model: spans, gates. Each part says what it needs besides torch."""
