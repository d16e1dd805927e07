"""Profiles: methods per layer and head, as files."""

from gossamer.profiles.profile import HeadPattern, Profile

__all__ = ["HeadPattern", "Profile"]
