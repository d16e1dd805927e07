"""Profiles: methods per layer and head, as files."""

from gossamer.profiles.profile import Profile, Provenance

__all__ = ["Profile", "Provenance"]
