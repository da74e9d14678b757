"""Small files that are replaced in one go, and what makes a write last through a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a small file in one go: who reads it meets the old or the new one.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        flush_to_disk(aside)
        aside.replace(path)
        flush_to_disk(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Comes back when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
