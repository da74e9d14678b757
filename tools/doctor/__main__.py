"""`unicl-doctor`: the environment on one screen, with what to do where something is wrong.

Reads the arguments, prints the rows and ends with the exit code. It needs neither torch nor tyro,
since it has to run where they are broken.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from unicl_fast.distributed.launch import stop
from unicl_fast.system.machine import check_current_folder
from unicl_fast.system.program import begin_program
from unicl_fast.system.wording import count_of, print_text, without_secrets

from . import machine, software
from .rows import Found, run_checks

CHECKS = [*software.CHECKS, *machine.CHECKS]
"""The checks in the order of the screen."""
_PROGRAM = "unicl-doctor"
_WORDS = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}
_INDENT = 26  # columns before the text of a row
_WIDEST = 110


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 where there is a fault, 2 on wrong usage."""
    argv = begin_program() if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Checks what the other programs need: packages, devices, cores, memory, "
        "disks. FAULT: runs will fail. WARNING: something is slow, or an option "
        "is not available. Exit code: 0 without faults, 1 with.",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows into it; - prints them")
    arguments = parser.parse_args(argv)
    rows: dict[str, Found] = {}
    try:
        check_current_folder()
        for name, found in run_checks(CHECKS):
            rows[name] = found
            if arguments.json != "-":
                print_row(name, found)
        if arguments.json == "-":
            print(as_json(rows))
        elif arguments.json is not None:
            Path(arguments.json).write_text(as_json(rows) + "\n", encoding="utf-8")
    except OSError as error:
        stop(_PROGRAM, error, code=2)
    faults, warnings, left_out = summarise(rows)
    if arguments.json != "-":
        more = f"; not checked: {', '.join(left_out)}" if left_out else ""
        print(f"\n{count_of(faults, 'fault')}, {count_of(warnings, 'warning')}{more}")
    sys.exit(faults > 0)


def summarise(rows: Mapping[str, Found]) -> tuple[int, int, list[str]]:
    """Numbers of faults and of warnings, and the names of the checks that were left out."""
    states = [found.state for found in rows.values()]
    left_out = [check.name for check in CHECKS if check.name not in rows]
    return states.count("fault"), states.count("warning"), left_out


def as_json(rows: Mapping[str, Found]) -> str:
    """The rows by name, and how many have each state."""
    faults, warnings, left_out = summarise(rows)
    shown = [
        {"name": name} | {key: without_secrets(text) for key, text in found._asdict().items()}
        for name, found in rows.items()
    ]
    counts = {"num_faults": faults, "num_warnings": warnings, "not_checked": left_out}
    return json.dumps(counts | {"rows": shown}, indent=1)


def print_row(name: str, row: Found) -> None:
    """Prints a line or more for a row, as wide as the terminal."""
    width = min(_WIDEST, max(60, shutil.get_terminal_size((80, 24)).columns))
    wrap = functools.partial(textwrap.wrap, width=width - _INDENT, break_on_hyphens=False)
    lines = wrap(row.found) + (wrap(f"-> {row.fix}") if row.fix else [])
    indent = "\n" + " " * _INDENT
    print_text(f"{_WORDS[row.state]:8}{name:{_INDENT - 8}}{indent.join(lines)}", sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
