"""The progress bar for work whose steps can be counted; `line` is for all other work.

A terminal shows it live, after two seconds; a log gets a line every 30 seconds.
"""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_SOON = 2.0  # seconds before a bar is shown
_LOG_SECONDS = 30.0  # between two lines in a log


class ForgivingStderr:
    """stderr for a bar: an error of it, such as a log's full disk, must not end the work."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:  # tqdm finds the bars that share a terminal by it
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


class _Log(ForgivingStderr):
    """stderr that is no terminal: a bar's states become lines, without what moves the cursor."""

    def write(self, text: str) -> int:
        if shown := text.replace("\x1b[A", "").strip():
            super().write(f"{shown}\n")
        return len(text)


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A tqdm on stderr, with tqdm's arguments and methods."""

    def __init__(self, *of: Any, shown: bool = True, **options: Any) -> None:
        """Counts the items of an iterable, or calls of `update`; writes nothing if not `shown`."""
        self._is_live, self._shown_at = sys.stderr.isatty(), time.monotonic()
        delay, interval = (_SOON, min(_SOON, 0.2)) if self._is_live else (_LOG_SECONDS,) * 2
        super().__init__(
            *of, **options, delay=delay, mininterval=interval, smoothing=0.1, dynamic_ncols=True,
            file=ForgivingStderr() if self._is_live else _Log(), disable=not shown,
        )  # fmt: skip
        # tqdm's own clock can be set back, and the bar would stand still until it has caught up
        self._time = time.monotonic
        self.start_t = self.last_print_t = self._time()

    def refresh(self, *of: Any, **options: Any) -> None:
        """Shows the present state, in a log if it is time for a line."""
        now = time.monotonic()
        if self._is_live or now - self._shown_at >= _LOG_SECONDS:
            self._shown_at = now
            super().refresh(*of, **options)

    @classmethod
    def write(
        cls, s: str, file: TextIO | None = None, end: str = "\n", nolock: bool = False
    ) -> None:
        """Writes a line above the bars."""
        forgiving = ForgivingStderr() if file is sys.stderr else file
        super().write(s, file=forgiving, end=end, nolock=nolock)


@contextlib.contextmanager
def log_above_bars() -> Iterator[None]:
    """Writes warnings, and log lines for the console, above the bars within this context."""
    handlers, console = logging.getLogger().handlers, (sys.stdout, sys.stderr)
    # tqdm would show a log that only goes to a file; without handlers, logging writes to stderr
    is_shown = not handlers or any(getattr(one, "stream", None) in console for one in handlers)
    before, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        with logging_redirect_tqdm(tqdm_class=Bar) if is_shown else contextlib.nullcontext():
            yield
    finally:
        warnings.showwarning = before


def _show_warning(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    write_line(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"))


def write_line(text: str) -> None:
    """Writes a line to stderr, above the bars."""
    Bar.write(text, file=sys.stderr)
