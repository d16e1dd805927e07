"""Profiles: methods per layer and head, and numbers that methods take by layer and head, as files."""

from gossamer.profiles.channels import read_channels, write_channels
from gossamer.profiles.hybrid import full_layers, hybrid_profile
from gossamer.profiles.profile import Profile, Provenance
from gossamer.profiles.tables import read_duo, read_moa, read_table, write_duo, write_moa

__all__ = [
    "Profile",
    "Provenance",
    "full_layers",
    "hybrid_profile",
    "read_channels",
    "read_duo",
    "read_moa",
    "read_table",
    "write_channels",
    "write_duo",
    "write_moa",
]
