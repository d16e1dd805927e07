"""Lets the API pages show the ``Fields:`` of a docstring as a table, as Griffe shows ``Attributes:``."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELDS = re.compile(r"^Fields(?: \((.*)\))?:$", re.MULTILINE)


class Fields(griffe.Extension):
    """Griffe knows the section by the other name alone; what follows that name becomes its title."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = FIELDS.sub(lambda found: f"Attributes: {found[1] or 'Fields'}:", text)
