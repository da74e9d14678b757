"""Checks, made in a child process, which one of them may end or block.

A library for another processor ends the process that imports it, and a driver or mount that is
gone blocks it forever. Such a check is a fault, and the others are still made.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Literal, NamedTuple

from unicl_fast.system.wording import shorten

_IDLE_SECONDS = 120.0
"""A check that has neither answered nor computed for this long is blocked. One that computes may
take any time: on a busy machine importing torch takes minutes."""


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
    checks: Sequence[Check], *, seconds: float = _IDLE_SECONDS
) -> Iterator[tuple[str, Found]]:
    """Runs checks in order in a child process, and yields each result as soon as it is known.

    After a check that ended the child, or was idle for `seconds`, a new child makes the others.
    Where a check failed, those that need it are left out.
    """
    context = multiprocessing.get_context("fork")
    failed: set[str] = set()
    child = None
    for number, check in enumerate(checks):
        if failed.intersection(check.needs):
            continue
        if child is None:
            results, sending = context.Pipe(duplex=False)
            arguments = (checks[number:], set(failed), sending)
            child = context.Process(target=_serve, args=arguments, daemon=True)
            child.start()
            sending.close()
        try:
            found = _receive(results, child, seconds)
        except (EOFError, ConnectionError):
            child.join()
            code = child.exitcode or 0
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            fix = "reinstall the library that it imports"
            found, child = Found("fault", f"the check ended its process {how}", fix), None
        if found is None:
            assert child is not None
            child.kill()
            fix = "see which disk, mount or driver does not answer: mount, dmesg, nvidia-smi"
            found, child = (
                Found("fault", f"blocked: no answer, and idle for {seconds:g} s", fix),
                None,
            )
        if found.state == "fault":
            failed.add(check.name)
        yield check.name, found


def _receive(results: Connection, child: ForkProcess, seconds: float) -> Found | None:
    """The next result; None where the child is idle."""
    spent = ""
    while not results.poll(seconds):
        status = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8")
        before, spent = spent, " ".join(status.rpartition(")")[2].split()[11:13])  # CPU times
        if spent == before:
            return None
    found: Found = results.recv()
    return found


def _serve(checks: Sequence[Check], failed: Collection[str], results: Connection) -> None:
    """Sends the results of checks in order; libraries' own messages lead nowhere."""
    failed = set(failed)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    for check in checks:
        if failed.intersection(check.needs):
            continue
        try:
            found = check.look()
        except Exception as error:
            text = f"the check failed: {shorten(error, limit=300)}"
            found = Found("fault", text, "mend what the error names, and start again")
        if found.state == "fault":
            failed.add(check.name)
        results.send(found)
