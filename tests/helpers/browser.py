"""Opens a page in headless Chromium."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


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
