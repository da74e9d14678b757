"""The rows of the screen: checks, each run in a child process, which it can crash or block.

A library for another processor crashes the process that imports it, and a missing driver blocks it
for ever. Such a check is a fault, and the others still run.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from unicl_fast.system.child import Death, run_limited
from unicl_fast.system.wording import shorten

_SECONDS = 600.0  # limit of a check: on a busy machine importing torch needs minutes


class Found(NamedTuple):
    """The result of a check."""

    state: Literal["ok", "warning", "fault"]
    """warning: something is slow, or an option is not available; fault: runs will fail."""
    found: str
    fix: str = ""


Check = Callable[[], Found]
"""An importable function that checks one thing."""


def run_checks(
    checks: Mapping[str, Check], *, seconds: float = _SECONDS
) -> Iterator[tuple[str, Found]]:
    """Runs checks in order, each for at most `seconds`; yields names and results as they come."""
    for name, found in zip(
        checks, run_limited(_look, checks.values(), seconds=seconds), strict=True
    ):
        if isinstance(found, Death):
            fix = "reinstall the library that it imports"
            if found.kind == "time":
                fix = "see which disk or driver does not answer: dmesg, nvidia-smi"
            found = Found("fault", f"the check {found.how}", fix)
        yield name, found


def _look(check: Check) -> Found:
    logging.disable()
    warnings.simplefilter("ignore")
    try:
        return check()
    except Exception as error:
        text = f"the check failed: {shorten(error, limit=300)}"
        return Found("fault", text, "correct the error, and start again")
