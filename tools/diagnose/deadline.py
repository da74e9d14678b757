"""Ends a diagnosis at its deadline, and shows how far it is.

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
from unicl_fast.system.phases import current_phase

if TYPE_CHECKING:  # it imports torch
    from .report import Diagnosis

START_SECONDS = 60.0  # for imports, data and model
_LAST_SECONDS = 5.0  # the other ranks end this long after rank 0
_LOOK_SECONDS = 0.5
_EXIT_NOTHING = 2


class Budget:
    """The seconds for a diagnosis, and for each of its turns."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.turn = min(1.0, seconds / 80)  # seconds of one contestant's turn
        self.most_seconds = START_SECONDS + 2 * seconds  # the process ends after them
        self.begin("building the run")
        # an older process began with something else
        age = min(START_SECONDS, seconds_since_start())
        self.deadline = self._since + self.most_seconds - age

    def begin(self, phase: str) -> None:
        """Starts the seconds again, in a phase with a name to show."""
        self.phase, self._since = phase, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds left; negative afterwards."""
        return self.seconds - (time.monotonic() - self._since)


class Deadline:
    """Ends this process when a diagnosis is too slow."""

    def __init__(
        self, seconds: float, *, scratch: Path, conclude: Callable[[Diagnosis], None]
    ) -> None:
        """`conclude` reports a diagnosis."""
        self.budget = Budget(seconds)
        self.found: Diagnosis | None = None  # the latest results
        self._scratch, self._conclude = scratch, conclude
        self._is_main = os.environ.get("RANK", "0") == "0"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="unicl-deadline", daemon=True)

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Shows the present phase and enforces the deadline during the block."""
        self._thread.start()
        try:
            yield
        except RuntimeError:
            if not self._is_main and self._is_near:  # rank 0 has ended there
                self._thread.join()
            raise
        finally:
            self._over.set()
            self._thread.join()

    @property
    def _is_near(self) -> bool:
        return time.monotonic() > self.budget.deadline - _LAST_SECONDS

    def _watch(self) -> None:
        budget = self.budget
        later = 0.0 if self._is_main else _LAST_SECONDS  # rank 0 has to report

        def describe(_: float) -> str:
            return f"{budget.phase}: {budget.seconds - budget.left:.0f} of {budget.seconds:.0f} s"

        with line(describe):
            while time.monotonic() < budget.deadline + later:  # it moves when the run starts
                if self._over.wait(_LOOK_SECONDS):
                    return
        self._end()

    def _end(self) -> None:
        code = 0
        try:
            if self.found is not None:
                print(f"cut off at the deadline, during: {self.budget.phase}", file=sys.stderr)
                self._conclude(self.found)
            elif self._is_main:
                code = _EXIT_NOTHING
                print(
                    "unicl-bench: nothing could be measured within "
                    f"{self.budget.most_seconds:.0f} s ({START_SECONDS:g} and twice --seconds), "
                    f"during: {self.budget.phase}, {current_phase().name}. See why the loader or "
                    "its storage waits, or raise --seconds",
                    file=sys.stderr,
                )
            shutil.rmtree(self._scratch, ignore_errors=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def seconds_since_start() -> float:
    """Seconds since this process started; Linux only."""
    text = Path("/proc/self/stat").read_text(encoding="utf-8")
    ticks = int(text[text.rindex(")") + 2 :].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
