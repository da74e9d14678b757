"""Shows what a program is doing, on a terminal to which it has printed nothing for a while.

It is the stage that a watchdog looks at (`progress`). It is added to the last line, which may be a
progress bar, and taken away before anything else is printed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator

from unicl_fast.system.progress import current_stage

_QUIET_SECONDS = 1.0
"""How long nothing was printed before the stage is shown."""
_LOOK_SECONDS = 0.5
_UP, _ERASE_REST = b"\x1b[A", b"\x1b[K"


class StatusLine:
    """The last line of a terminal, to which a thread adds the present stage."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.RLock()  # a signal's handler may print while its thread does
        self._line = b""
        """The program's own part of the line."""
        self._is_added_to = self._has_printed = False
        self._printed_at = time.monotonic()
        self._first_stage = current_stage()

    @contextlib.contextmanager
    def printing(self) -> Iterator[None]:
        """Within this context the terminal is the program's own."""
        with self._lock:
            if self._is_added_to:
                os.write(self._descriptor, b"\r" + self._line + _ERASE_REST)
                self._is_added_to = False
            yield

    def note(self, printed: bytes) -> None:
        """Notes what the program has printed."""
        self._line = (self._line + printed).rpartition(b"\n")[2].rpartition(b"\r")[2]
        self._printed_at, self._has_printed = time.monotonic(), True

    def add_stage(self) -> None:
        """Shows the stage if the program has been quiet; below a bar that moved up it cannot."""
        with self._lock:
            quiet, stage = time.monotonic() - self._printed_at, current_stage()
            if quiet < _QUIET_SECONDS or not stage.name or _UP in self._line:
                return
            # a program without stages is not always starting
            is_vague = stage is self._first_stage and self._has_printed
            name = "working" if is_vague else stage.name
            step = "" if stage.step is None or is_vague else f" {stage.step:,} steps done,"
            added = f"[{name},{step} {quiet:.0f} s]"
            own = self._line.decode("utf-8", "replace")
            own = own[: max(0, shutil.get_terminal_size().columns - len(added) - 2)]
            text = f"\r{own}{' ' * bool(own)}{added}".encode()
            os.write(self._descriptor, text + _ERASE_REST)
            self._is_added_to = True


shown: StatusLine | None = None
"""The one that this process shows now."""


@contextlib.contextmanager
def showing(descriptor: int) -> Iterator[None]:
    """Shows the stage on a terminal within this context, in which `note` gets all that is printed.

    See `program.showing_stages`.
    """
    global shown
    status = shown = StatusLine(descriptor)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            with contextlib.suppress(OSError):  # the terminal may be gone
                status.add_stage()

    thread = threading.Thread(target=look, name="status line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with status.printing():
            shown = None


def _forget() -> None:
    """A forked process has no thread, and perhaps a lock that nobody releases."""
    global shown
    shown = None


os.register_at_fork(after_in_child=_forget)
