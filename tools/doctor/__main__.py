"""`unicl-doctor`: the environment on one screen, with what to do where something is wrong.

Reads the arguments, prints the rows and ends with the exit code. It needs neither torch nor tyro,
since it has to run where they are broken.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from unicl_fast.distributed.launch import stop
from unicl_fast.system.program import begin_program
from unicl_fast.system.wording import count_of, print_text, without_secrets

from . import machine, packages, storage
from .rows import Check, Row, run_checks

_PROGRAM = "unicl-doctor"
_WORDS = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}
_COLOURS = {"ok": "32", "warning": "33", "fault": "31"}
_INDENT = 26  # where what was found begins
_WIDEST = 110


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 where there is a fault, 2 on wrong usage."""
    argv = begin_program() if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Looks at what the other programs need: packages, devices, cores, memory, "
        "limits, disks, networks. FAULT: runs fail. WARNING: something is slow, or an option is "
        "not to be had. Exit code: 0 without faults, 1 with.",
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="also measure how fast it reads")
    parser.add_argument("--json", metavar="FILE", help="also write the rows into it; - prints them")
    arguments = parser.parse_args(argv)
    rows = run_checks(all_checks(arguments.data))
    try:
        if arguments.json == "-":
            print(as_json(rows))
        else:
            print_rows(rows, sys.stdout)
            if arguments.json is not None:
                Path(arguments.json).write_text(as_json(rows) + "\n", encoding="utf-8")
    except OSError as error:
        stop(_PROGRAM, error, code=2)
    sys.exit(any(row.state == "fault" for row in rows))


def all_checks(data: Path | None) -> list[Check]:
    """The checks in the order of the screen; `data` is the folder or file to read."""
    checks = [
        storage.CURRENT_FOLDER, *packages.CHECKS, *machine.CHECKS, *storage.CHECKS,
    ]  # fmt: skip
    if data is not None:
        checks.append(Check("data", functools.partial(storage.check_data, data)))
    return checks


def as_json(rows: Sequence[Row]) -> str:
    """The rows, and how many have each state."""
    counts = Counter(row.state for row in rows)
    return json.dumps(
        {
            "num_faults": counts["fault"],
            "num_warnings": counts["warning"],
            "rows": [
                {name: without_secrets(text) for name, text in row._asdict().items()}
                for row in rows
            ],
        },
        indent=1,
    )


def print_rows(rows: Sequence[Row], file: TextIO) -> None:
    """Prints a line or more for each row, and how many are not ok."""
    width = min(_WIDEST, max(60, shutil.get_terminal_size((80, 24)).columns))
    for row in rows:
        word = f"{_WORDS[row.state]:8}"
        if _has_colours(file):
            word = f"\x1b[{_COLOURS[row.state]}m{word}\x1b[0m"
        file.write(word)
        wrap = functools.partial(textwrap.wrap, width=width - _INDENT, break_on_hyphens=False)
        lines = wrap(row.found) + (wrap(f"-> {row.fix}") if row.fix else [])
        indent = "\n" + " " * _INDENT
        print_text(f"{row.name:{_INDENT - 8}}{indent.join(lines)}", file)
    counts = Counter(row.state for row in rows)
    faults, warnings = (count_of(counts[state], state) for state in ("fault", "warning"))
    print_text(f"\n{faults}, {warnings}", file)


def _has_colours(file: TextIO) -> bool:
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    main()
