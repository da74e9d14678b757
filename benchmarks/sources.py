"""The sources that a program times, as marks of its result: a figure is stale once many differ.

Each function has a mark, without comments, docstrings and layout: it changes only where a program
computes something else, and it is the same under each version of Python.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or the installed library."""
_MARK_LENGTH = 6
_MOST_CHANGED = 0.1
"""Part of the functions that may have changed since a figure was measured."""


def marks_of(rooms: Sequence[str]) -> dict[str, Any]:
    """The rooms (folders or files of the library), and the marks of all functions in them."""
    found = {
        hashlib.sha256("\n".join(words).encode()).hexdigest()[:_MARK_LENGTH]
        for room in rooms
        for path in _files(room)
        for part in _parts(ast.parse(path.read_text(encoding="utf-8")))
        if (words := list(_words(part)))
    }
    return {"rooms": list(rooms), "marks": " ".join(sorted(found))}


def is_stale(sources: Mapping[str, Any] | None) -> bool:
    """Whether more than a tenth of what a result timed has changed since, or is not known."""
    if sources is None:
        return True
    now = set(marks_of(sources["rooms"])["marks"].split())
    return len(now - set(sources["marks"].split())) > _MOST_CHANGED * len(now)


def _parts(tree: ast.Module) -> Iterator[ast.AST]:
    """Functions, those of classes too, and all other statements."""
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            yield from statement.body
        else:
            yield statement


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
