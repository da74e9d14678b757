"""Ends a diagnosis at its deadline, and names what takes long in it.

Python cannot interrupt a loader that hangs, so a thread ends the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unicl_fast.system.line import line
from unicl_fast.system.phases import Phase, current_phase

if TYPE_CHECKING:  # it imports torch
    from .model import Measured

START_SECONDS = 55.0  # for imports, data and model; Python itself needs some before
_LAST_SECONDS = 5.0  # the other ranks end this long after rank 0
_LOOK_SECONDS = 0.5
_EXIT_NOTHING = 2


class Deadline:
    """The time for a diagnosis; ends this process when it is over."""

    found: Measured | None = None
    """The latest results."""

    def __init__(
        self, seconds: float, *, scratch: Path, conclude: Callable[[Measured], None]
    ) -> None:
        """`conclude` reports a diagnosis."""
        self.seconds = seconds
        self.turn = min(1.0, seconds / 80)  # seconds of one contestant's turn
        self.begin_anew()
        self._scratch, self._conclude = scratch, conclude
        self._is_main = os.environ.get("RANK", "0") == "0"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="unicl-deadline", daemon=True)

    def begin_anew(self) -> None:
        """Moves the deadline: the run is built."""
        self.begin("building the run")
        self._end = self._since + START_SECONDS + 2 * self.seconds

    def begin(self, phase: str) -> None:
        """Starts the seconds again, in a phase with a name to show."""
        self.phase, self._since = phase, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds left; negative afterwards."""
        return self.seconds - (time.monotonic() - self._since)

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Names each long phase once and enforces the deadline during the block."""
        self._thread.start()
        try:
            yield
        except RuntimeError:
            if not self._is_main and time.monotonic() > self._end - _LAST_SECONDS:
                self._thread.join()  # rank 0 has ended
            raise
        finally:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        later = 0.0 if self._is_main else _LAST_SECONDS  # rank 0 has to report
        with line(lambda: Phase(self.phase)):
            while time.monotonic() < self._end + later:  # it moves when a run is built
                if self._over.wait(_LOOK_SECONDS):
                    return
        code = 0
        try:
            if self.found is not None:
                print(f"cut off at the deadline, during: {self.phase}", file=sys.stderr)
                self._conclude(self.found)
            elif self._is_main:
                code = _EXIT_NOTHING
                print(
                    "unicl-bench: nothing could be measured within "
                    f"{START_SECONDS + 2 * self.seconds:.0f} s ({START_SECONDS:g} and twice "
                    f"--seconds), during: {self.phase}, {current_phase().name}. See why the loader "
                    "or its storage waits, or raise --seconds",
                    file=sys.stderr,
                )
            shutil.rmtree(self._scratch, ignore_errors=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
