"""Checks, and a child process, which a check may end without ending the program.

A library for another processor ends the process that imports it, and a driver or mount that is
gone blocks it forever. Such a check is a fault, and the others are still made.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

from unicl_fast.system.wording import shorten

_IDLE_SECONDS = 60.0
"""A check that uses no CPU time for this long is blocked."""
_MOST_WAITS = 10
"""A check that still computes after this many times `idle_seconds` is given up."""


class Found(NamedTuple):
    """The result of a check."""

    state: Literal["ok", "warning", "fault"]
    """ok; warning: something is slow, or an option is not available; fault: runs will fail."""
    found: str
    fix: str = ""
    """The remedy, where one is needed."""


@dataclass(frozen=True, slots=True)
class Check:
    """A function that looks at one thing."""

    name: str
    look: Callable[[], Found]
    needs: tuple[str, ...] = ()
    """Earlier checks; where one of them failed, this one is left out."""


def run_checks(
    checks: Sequence[Check], *, idle_seconds: float = _IDLE_SECONDS
) -> Iterator[tuple[str, Found]]:
    """Runs checks in order in a child process, and yields each result as soon as it is known.

    On a busy machine importing torch takes minutes, so a check that computes is waited for; one
    without CPU time for `idle_seconds` is blocked. The next check then gets a new child. Where a
    check failed, those that need it are left out.
    """
    failed: set[str] = set()
    child = None
    for number, check in enumerate(checks):
        if failed.intersection(check.needs):
            continue
        child = child or _Child(checks)
        found = child.look(number, idle_seconds)
        if child.is_lost or found.state == "fault":
            failed.add(check.name)
        if child.is_lost:
            child.end()
            child = None
        yield check.name, found
    if child is not None:
        child.end()


class _Child:
    """A forked process that makes checks one by one."""

    def __init__(self, checks: Sequence[Check]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(checks, other, self._pipe))
        self._process.start()
        other.close()
        self.is_lost = False
        """After a check that ended the process, is blocked, or takes too long."""

    def look(self, number: int, idle_seconds: float) -> Found:
        self._pipe.send(number)
        before = self._cpu_ticks()
        for _ in range(_MOST_WAITS):
            if self._pipe.poll(idle_seconds):
                return self._receive()
            if (now := self._cpu_ticks()) == before:
                self.is_lost = True
                fix = "see which disk, mount or driver does not answer: mount, dmesg, nvidia-smi"
                return Found("fault", f"blocked: no CPU time in {idle_seconds:.0f} s", fix)
            before = now
        self.is_lost = True
        found = f"not finished after {_MOST_WAITS * idle_seconds:.0f} s of computing"
        return Found("warning", found, "end other programs (see top), and start again")

    def _receive(self) -> Found:
        try:
            return Found(*self._pipe.recv())
        except (EOFError, ConnectionError):
            self.is_lost = True
        self._process.join()
        code = self._process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        fix = "reinstall the library that it imports"
        return Found("fault", f"the check ended its process {how}", fix)

    def _cpu_ticks(self) -> int:
        """CPU time of all threads of the process."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        return sum(map(int, stat.rpartition(")")[2].split()[11:13]))

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(checks: Sequence[Check], pipe: Connection, parents: Connection) -> None:
    """Sends the result of each check whose number comes; libraries' own messages lead nowhere."""
    parents.close()  # so that this process ends with its parent
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    while True:
        check = checks[pipe.recv()]
        try:
            found = check.look()
        except Exception as error:
            text = f"the check failed: {shorten(error, limit=300)}"
            found = Found("fault", text, "mend what the error names, and start again")
        pipe.send(found)
