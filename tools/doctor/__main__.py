"""`unicl-doctor`: the environment on one screen, with a remedy for each fault.

Needs neither torch nor tyro, since it has to run if they are broken.
"""

import argparse
import functools
import shutil
import sys
import textwrap
from collections.abc import Sequence

from unicl_fast.distributed.launch import stop
from unicl_fast.system.machine import check_current_folder
from unicl_fast.system.program import begin_program
from unicl_fast.system.wording import count_of, print_text

from . import machine, software
from .rows import Found, run_checks

CHECKS = software.CHECKS | machine.CHECKS
_PROGRAM = "unicl-doctor"
_WORDS = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}
_INDENT = 26  # columns before the text of a row


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 if there is a fault, 2 on wrong usage."""
    argv = begin_program() if argv is None else list(argv)
    argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Checks what the other programs need: packages, devices, cores, disks. "
        "FAULT: runs will fail. WARNING: something is slow, or an option "
        "is not available. Exit code: 0 without faults, 1 with.",
    ).parse_args(argv)
    states: list[str] = []
    try:
        check_current_folder()
        for name, found in run_checks(CHECKS):
            states.append(found.state)
            print_row(name, found)
    except OSError as error:
        stop(_PROGRAM, error, code=2)
    print(f"\n{', '.join(count_of(states.count(one), one) for one in ('fault', 'warning'))}")
    print("see also: pip check; for a bug report: python -m torch.utils.collect_env")
    sys.exit("fault" in states)


def print_row(name: str, row: Found) -> None:
    """Prints a row, wrapped at the terminal's width."""
    width = max(60, shutil.get_terminal_size((80, 24)).columns) - _INDENT
    wrap = functools.partial(textwrap.wrap, width=width, break_on_hyphens=False)
    lines = wrap(row.found) + (wrap(f"-> {row.fix}") if row.fix else [])
    indent = "\n" + " " * _INDENT
    print_text(f"{_WORDS[row.state]:8}{name:{_INDENT - 8}}{indent.join(lines)}", sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
