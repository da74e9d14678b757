"""Rewrites links out of docs/ before mkdocs makes a page: they lead nowhere in the site.

On a code host `../unicl_fast/objectives/loss.py` is the file; here a module becomes a link to its
place in the API page, and everything else its own name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_API = Path(__file__).parents[1] / "api.md"
_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    known = re.findall(r"^::: (\S+)", _API.read_text(encoding="utf-8"), flags=re.MULTILINE)

    def replace(link: re.Match[str]) -> str:
        module = link["path"].removesuffix(".py").replace("/", ".")
        for name in known:
            if f"{name}.".startswith(f"{module}."):
                return f"[{link['text']}](api.md#{name})"
        path = Path(link["path"])
        if link["text"].strip("`") in (link["path"], path.name, path.stem):
            return f"`{path}`"
        return f"{link['text']} (`{path}`)"

    return _LINK.sub(replace, markdown)
