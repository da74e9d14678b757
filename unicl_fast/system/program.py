"""The first things that every program does, before it reads its arguments.

Names of files and texts mean the same bytes under every locale, and a reader of the output that
leaves early, as `head` does, is no fault of the program.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from unicl_fast.system.version import __version__

_UTF8_MODE = "PYTHONUTF8"


def begin_program() -> list[str]:
    """Prepares this process as that of a program; returns its arguments.

    `--version` alone is answered here, and ends it.
    """
    # Under LC_ALL=C or a locale of ISO-8859-1 Python may take file names for other characters than
    # under C.UTF-8, and class names come from them. It knows no way to change its mind.
    if not has_utf8_names() and os.environ.get(_UTF8_MODE) != "1":
        os.environ[_UTF8_MODE] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.stdout, sys.stderr = map(_without_broken_pipe, (sys.stdout, sys.stderr))
    if sys.argv[1:] == ["--version"]:
        print(f"unicl_fast {__version__}")
        sys.exit()
    if not sys.warnoptions:  # what libraries tell their callers is for tests; -W shows it
        warnings.simplefilter("ignore", FutureWarning)
    return sys.argv[1:]


@contextlib.contextmanager
def logging_at(name: str, level: int) -> Iterator[None]:
    """Keeps messages of a logger that are below a level back while the block lasts."""
    chosen = logging.getLogger(name)
    before = chosen.level
    chosen.setLevel(level)
    try:
        yield
    finally:
        chosen.setLevel(before)


def has_utf8_names() -> bool:
    """Whether Python takes file names for UTF-8, as everywhere but under odd locales."""
    return sys.getfilesystemencoding() == "utf-8"


def require_utf8_names() -> None:
    """Raises ValueError where the same files would have other names than elsewhere."""
    if not has_utf8_names():
        raise ValueError(
            f"Python takes file names for {sys.getfilesystemencoding()} under this locale, and a "
            f"data set would get other names than elsewhere: start Python with {_UTF8_MODE}=1"
        )


class _Output(io.FileIO):
    """Standard output or error, which leads nowhere once its reader has left."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            # The work continues; what C++ libraries write, and Python's last flush, need it too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data) or 0


def _without_broken_pipe(stream: TextIO) -> TextIO:
    try:
        raw = _Output(stream.fileno(), "wb", closefd=False)
    except (AttributeError, OSError, ValueError):  # no stream at all, or one of a notebook's
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )
