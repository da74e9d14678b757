"""Pages as a parser reads them: they load nothing, run nothing, and obey no text in them."""

import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Elements with their attributes, headings, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        content = path.read_text(encoding="utf-8")
        self.headings = re.findall(r"<h[12][^>]*>(.*?)</h[12]>", content)
        self.feed(content)
        assert not {tag for tag, _ in self.tags} & {
            *["script", "link", "iframe", "object", "form", "base"]
        }
        for _, attributes in self.tags:
            assert not [name for name in attributes if name.startswith("on")]
            loaded = [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
            assert all(str(address).startswith("data:image/") for address in loaded)
        assert not re.search(r"https?://|url\(", content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
