"""unicl-pack called in this process, and small images for it to pack."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg

from unicl_fast.tools.pack.__main__ import main


def jpeg(number: int) -> bytes:
    """An image of 32 x 24 pixels; every number has its own."""
    pixels = np.full((24, 32, 3), (number * 7 % 256, number % 256, 200), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=90))


def run_pack(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and all that was printed."""
    try:
        main([*map(str, arguments)])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out + printed.err
