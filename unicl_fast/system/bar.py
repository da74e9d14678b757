"""The one progress bar, for work whose steps can be counted; `line` is for all other work.

A terminal gets a live image, a log a line every 30 seconds, and work of less than two seconds is
not shown at all.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_SOON = 2.0
"""Seconds before a bar is shown."""


class ForgivingStderr:
    """stderr for a bar: a log on a full disk must not end the work."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:  # so tqdm knows bars that share a terminal
        return isinstance(other, ForgivingStderr)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stderr, name)


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A tqdm on stderr, with tqdm's arguments and methods."""

    def __init__(self, *of: Any, shown: bool = True, **options: Any) -> None:
        """Counts the items of an iterable, or calls of `update`; one not `shown` writes nothing."""
        usual = {
            "delay": _SOON,
            "mininterval": min(_SOON, 0.2 if sys.stderr.isatty() else 30),
            "smoothing": 0.1,
            "dynamic_ncols": True,
        }
        super().__init__(*of, **usual, **options, file=ForgivingStderr(), disable=not shown)
        # tqdm's own clock can be set back: the bar would stand still until it has caught up
        self._time = time.monotonic
        self.start_t = self.last_print_t = self._time()

    @classmethod
    def write(
        cls, s: str, file: TextIO | None = None, end: str = "\n", nolock: bool = False
    ) -> None:
        """Writes a line above the bars; an error of stderr loses it, as it loses a bar."""
        forgiving = ForgivingStderr() if file is sys.stderr else file
        super().write(s, file=forgiving, end=end, nolock=nolock)


@contextlib.contextmanager
def log_above_bars() -> Iterator[None]:
    """Writes warnings, and log lines for the console, above the bars within this context."""
    before, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        # tqdm would show a log that only goes to a file
        with logging_redirect_tqdm(tqdm_class=Bar) if _log_is_shown() else contextlib.nullcontext():
            yield
    finally:
        warnings.showwarning = before


def _log_is_shown() -> bool:
    """Whether log lines appear on the console: by a handler, or because there is none."""
    handlers = logging.getLogger().handlers
    console = (sys.stdout, sys.stderr)
    return not handlers or any(getattr(one, "stream", None) in console for one in handlers)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    write_line(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"))


def write_line(text: str) -> None:
    """Writes a line to stderr, above the bars that are shown there."""
    Bar.write(text, file=sys.stderr)
