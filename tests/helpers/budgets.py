"""Committed figures that may neither rise unseen nor fall unnoticed.

A change that alters them on purpose writes them anew with `UNICL_WRITE_BUDGETS=1` in pytest's
environment, and says in its commit why.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).parents[1] / "golden"
_HOW = "; if that is meant, run the test with UNICL_WRITE_BUDGETS=1 and commit the file"


def compare(file: str, name: str, found: Any, *, versions: dict[str, str] | None = None) -> None:
    """Compares figures, or nested ones, with those that a file in tests/golden has under a name.

    The figures depend on the `versions` of libraries; with others the test is skipped, and a
    function that finds the figures (`found`) is not called.
    """
    path = _FOLDER / file
    content = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("UNICL_WRITE_BUDGETS"):
        if versions and versions != content.get("versions"):
            content = {"versions": versions}  # figures of other versions say nothing of these
        content |= {name: found() if callable(found) else found}
        content = {key: content[key] for key in sorted(content)}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return
    if versions and versions != content["versions"]:
        both = content["versions"], versions
        kept, here = (", ".join(map(" ".join, one.items())) for one in both)
        pytest.skip(f"tests/golden/{file} is of {kept}; installed: {here}")
    found = found() if callable(found) else found
    wrong = list(_differences(content.get(name, {}), json.loads(json.dumps(found)), name))
    assert not wrong, f"tests/golden/{file}: " + ", ".join(wrong) + _HOW


def _differences(known: Any, found: Any, name: str):
    if isinstance(known, dict) and isinstance(found, dict):
        for key in sorted({*known, *found}):
            yield from _differences(known.get(key, 0), found.get(key, 0), f"{name}, {key}")
    elif known != found:
        change = ""
        if isinstance(known, int | float) and isinstance(found, int | float):
            change = "rose from " if found > known else "fell from "
        yield f"{name} {change}{known} to {found}"
