"""Opens a page in headless Chromium and tells what it made of it."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# srcdoc keeps the page's own policy and lets the outer page look in.
_OUTER = """<!DOCTYPE html><meta charset="utf-8">
<iframe id="page" srcdoc="PAGE"></iframe>
<script>
window.broken = false;
document.getElementById("page").onload = () => {
  const page = document.getElementById("page").contentDocument;
  const found = {
    headings: [...page.querySelectorAll("h1, h2")].map((one) => one.textContent),
    images: page.images.length,
    scripts: page.scripts.length,
    handlers: [...page.querySelectorAll("*")].filter((one) =>
      [...one.attributes].some((attribute) => attribute.name.startsWith("on"))).length,
    addresses: [...page.querySelectorAll("[src], [href], [srcset]")].map((one) =>
      (one.getAttribute("src") || one.getAttribute("href") || "").slice(0, 5)),
    text: page.body.innerText,
    broken: window.broken || Boolean(document.getElementById("page").contentWindow.broken),
  };
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
};
</script>
"""


def look_at(page: Path, tmp_path: Path) -> dict[str, Any]:
    """What a browser shows; skips the test where there is no Chromium."""
    text = html.escape(page.read_text(encoding="utf-8"), quote=True)
    path = tmp_path / "outer.html"
    path.write_text(_OUTER.replace("PAGE", text), encoding="utf-8")
    return dump_page(path.as_uri(), tmp_path)


def dump_page(address: str, tmp_path: Path) -> dict[str, Any]:
    """What a page leaves as JSON in an element `result`; skips the test without Chromium."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    done = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"),
            *("--dump-dom", address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    start, end = '<pre id="result">', "</pre>"
    assert start in done.stdout, done.stderr[-2000:]
    return json.loads(html.unescape(done.stdout.split(start)[1].split(end)[0]))
