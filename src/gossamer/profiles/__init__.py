"""Profiles: methods per layer and head, and numbers that methods take by layer and head, as files."""

from gossamer.profiles.profile import Profile, Provenance
from gossamer.profiles.tables import read_duo, read_moa, read_table, write_duo, write_moa

__all__ = ["Profile", "Provenance", "read_duo", "read_moa", "read_table", "write_duo", "write_moa"]
