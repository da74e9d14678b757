"""Rewrites links out of docs/ before mkdocs makes a page, and lets inline code break readably.

On a code host `../unicl_fast/objectives/loss.py` is the file; here a module becomes a link to its
place in the API page, and everything else its own name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_API = Path(__file__).parents[1] / "api.md"
_CODE = re.compile(r"<pre.*?</pre>|(?<=<code>)[^<]+(?=</code>)", re.DOTALL)
_SEPARATOR = re.compile(r"(?<=\w[_/:=,])(?=[A-Za-z])|(?<=\w\.)(?=[A-Za-z]\w{5})")
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


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for each page's HTML."""

    def add_breaks(code: re.Match[str]) -> str:
        if code[0].startswith("<pre"):
            return code[0]
        text = re.sub(r"(?<![\w-])--?\w+", r'<span class="unbroken">\g<0></span>', code[0])
        return re.sub(r"[\w./:=,-]{20,}", lambda word: _SEPARATOR.sub("<wbr>", word[0]), text)

    return _CODE.sub(add_breaks, html)
