"""Suggestions for paths that do not exist."""

import contextlib
import difflib
import os
from pathlib import Path


def nearest_name(path: str | os.PathLike[str]) -> str:
    """Returns a phrase with the existing path that is most like a missing one; "" if none is."""
    place = Path(path)
    above = next((each for each in place.parents if each.is_dir()), Path())
    wrong = place.relative_to(above).parts[0] if place.is_relative_to(above) else place.name
    alike: list[str] = []
    with contextlib.suppress(OSError):
        alike = difflib.get_close_matches(wrong, os.listdir(above), n=1)
    return f"; {above / alike[0]} is there" if alike else ""
