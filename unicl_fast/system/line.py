"""One line about work that cannot be counted, shown while the program prints nothing.

On a terminal it counts seconds behind the last line, which can be a `bar`, and is erased before
anything else is printed. A log gets it once.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

_SOON = 2.0  # seconds without output before the line is shown
_LOOK_SECONDS = 0.5
_UP, _ERASE_REST = b"\x1b[A", b"\x1b[K"

hooked: TextIO | None = None
"""The stderr whose output all passes through `printing`; set by `program.begin_program`."""


class _LastLine:
    """The last line of a terminal, to which a thread appends a text."""

    def __init__(self, descriptor: int) -> None:
        self.texts: list[Callable[[float], str]] = []
        """One for each open context; the innermost is shown."""
        self._descriptor = descriptor
        self._lock = threading.RLock()  # a signal handler can print while its thread prints
        self._own = b""
        """The program's part of the line."""
        self._is_added_to = False
        self._printed_at = time.monotonic()

    @contextlib.contextmanager
    def printing(self) -> Iterator[None]:
        """Within this context, only the program writes to the terminal."""
        with self._lock:
            if self._is_added_to:
                os.write(self._descriptor, b"\r" + self._own + _ERASE_REST)
                self._is_added_to = False
            yield

    def note(self, printed: bytes) -> None:
        """Remembers the program's output."""
        self._own = (self._own + printed).rpartition(b"\n")[2].rpartition(b"\r")[2]
        self._printed_at = time.monotonic()

    def add(self) -> None:
        """Shows the text if the program has been quiet; impossible below a bar that moved up."""
        with self._lock:
            quiet = time.monotonic() - self._printed_at
            text = self.texts[-1](quiet) if self.texts and quiet >= _SOON else ""
            if not text or _UP in self._own:
                return
            own = self._own.decode("utf-8", "replace")
            own = own[: max(0, shutil.get_terminal_size().columns - len(text) - 4)]
            shown = f"\r{own}{' ' * bool(own)}[{text}]".encode()
            os.write(self._descriptor, shown + _ERASE_REST)
            self._is_added_to = True


on_terminal: _LastLine | None = None
"""The last line that this process adds to now."""


@contextlib.contextmanager
def line(text: str | Callable[[float], str], *, shown: bool = True) -> Iterator[None]:
    """Names the work in this context if it lasts more than two seconds; only on rank 0.

    `text` can be a function that gets the seconds without output and returns the present text, or
    an empty one; only a terminal shows it. Without `shown` nothing is written.
    """
    with contextlib.ExitStack() as stack:
        if shown and os.environ.get("RANK", "0") == "0":
            if hooked is not None and hooked is sys.stderr and hooked.isatty():
                stack.enter_context(_added(text))
            elif isinstance(text, str):
                stack.enter_context(_said(text))
        yield


@contextlib.contextmanager
def _said(text: str) -> Iterator[None]:
    def say() -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed stderr
            print(f"{text} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(_SOON, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _added(text: str | Callable[[float], str]) -> Iterator[None]:
    global on_terminal
    is_first = on_terminal is None
    last = on_terminal = on_terminal or _LastLine(sys.stderr.fileno())
    say = text if callable(text) else lambda quiet: f"{text}, {quiet:.0f} s"
    last.texts.append(say)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            with contextlib.suppress(OSError):  # the terminal is gone
                last.add()

    thread = threading.Thread(target=look, name="line", daemon=True)
    if is_first:
        thread.start()
    try:
        yield
    finally:
        last.texts.remove(say)
        if is_first:
            ended.set()
            thread.join()
            with last.printing():
                on_terminal = None


def _forget() -> None:
    """A forked process has no thread, and can have a lock that nobody releases."""
    global on_terminal
    on_terminal = None


os.register_at_fork(after_in_child=_forget)
