"""The sources that a program times, as a mark of its result: figures are stale once they change.

A mark leaves out comments, docstrings and layout, so it changes only where a program computes
something else, and it is the same under each version of Python.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or the installed library."""


def mark_of(rooms: Sequence[str]) -> dict[str, object]:
    """The rooms (folders or files of the library), and the mark of all that they hold."""
    digest = hashlib.sha256()
    for room in rooms:
        for path in _files(room):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            digest.update("\n".join(_words(tree)).encode())
    return {"rooms": list(rooms), "mark": digest.hexdigest()[:16]}


def _files(room: str) -> list[Path]:
    for path in (_ROOT / "unicl_fast" / room, _ROOT / room):
        if found := sorted(path.rglob("*.py")) or [path] * path.is_file():
            return found
    raise ValueError(f"the library has no {room}, whose sources were to be marked")


def _words(tree: ast.AST) -> Iterator[str]:
    """Kinds of nodes, with their names and constants."""
    docstrings = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for part in (node, node.value)
    }
    for node in ast.walk(tree):
        if node not in docstrings:
            values = [one for _, one in ast.iter_fields(node) if isinstance(one, str | int | float)]
            yield " ".join([type(node).__name__, *map(repr, values)])
