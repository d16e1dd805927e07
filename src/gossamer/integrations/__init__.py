"""Seams to other people's programs; each module here imports its host when it is used."""
