"""Retrieval tasks, metrics and runners that compare sparse with dense attention."""
