"""Checks, their rows, and a process that they may end without ending the program.

A check says what it found. What it imports may be broken in any way: a library for another
processor ends the process, a driver or a mount that is gone blocks it for ever. So checks run in a
child process, and one that ends it, or takes too long, is a row as well.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unicl_fast.system.wording import shorten

State = Literal["ok", "warning", "fault"]

_MOST_SECONDS = 60.0
"""Time that a check may take; importing torch from a slow network disk is the longest."""


class Row(NamedTuple):
    """The result of a check."""

    name: str
    state: State
    """ok; warning: something is slow or absent that a run may do without; fault: runs fail."""
    found: str
    fix: str = ""
    """The remedy, where one is needed."""


class Found(NamedTuple):
    """As a check returns it; see `Row`."""

    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A function that looks at one thing."""

    name: str
    look: Callable[[], Found]
    needs: tuple[str, ...] = ()
    """Checks before it without which it cannot look; after a fault of theirs it does not."""


def run_check(check: Check, faults: Collection[str] = ()) -> Row:
    """Runs a check in this process; what it raises is a fault.

    `faults` are the names of the checks that found one.
    """
    for needed in check.needs:
        if needed in faults:
            return Row(
                check.name, "warning", f"not checked, because {needed} has a fault",
                f"mend {needed} first",
            )  # fmt: skip
    try:
        return Row(check.name, *check.look())
    except Exception as error:
        text = f"the check failed: {shorten(error, limit=300)}"
        return Row(check.name, "fault", text, "mend what the error names, and start again")


def run_checks(checks: Sequence[Check], *, most_seconds: float = _MOST_SECONDS) -> list[Row]:
    """Runs checks in order, each within `most_seconds`, in a child process.

    The next check after one that ended or blocked the child gets a child of its own.
    """
    rows: list[Row] = []
    while len(rows) < len(checks):
        reading, writing = os.pipe()
        faults = {row.name for row in rows if row.state == "fault"}
        child = os.fork()
        if not child:
            os.close(reading)
            _run_in_child(checks[len(rows) :], faults, writing)
        os.close(writing)
        with open(reading, "rb", buffering=0) as pipe:
            ended = _collect(pipe.fileno(), rows, len(checks), most_seconds)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if len(rows) < len(checks):
            what = f"took more than {most_seconds:.0f} s and was ended"
            if ended:
                what = f"ended its process with code {os.waitstatus_to_exitcode(status)}"
                if os.WIFSIGNALED(status):
                    what = f"ended its process by {signal.Signals(os.WTERMSIG(status)).name}"
            fix = "install anew the library, driver or disk that it looks at"
            rows.append(Row(checks[len(rows)].name, "fault", f"the check {what}", fix))
    return rows


def _collect(pipe: int, rows: list[Row], number: int, most_seconds: float) -> bool:
    """Adds the rows that a child writes; False if it stayed silent for too long."""
    text = b""
    deadline = time.monotonic() + most_seconds
    while len(rows) < number:
        if not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
            return False
        if not (more := os.read(pipe, 1 << 16)):
            return True
        *lines, text = (text + more).split(b"\n")
        rows += [Row(*json.loads(line)) for line in lines]
        if lines:
            deadline = time.monotonic() + most_seconds
    return True


def _run_in_child(checks: Sequence[Check], faults: set[str], pipe: int) -> None:
    """Writes a row a line, and ends the process; libraries' own messages lead nowhere."""
    code = 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # not what the process does that was forked
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        logging.disable()
        warnings.simplefilter("ignore")
        for check in checks:
            row = run_check(check, faults)
            if row.state == "fault":
                faults.add(row.name)
            os.write(pipe, json.dumps(row).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)  # nothing of the parent's is flushed or closed twice
