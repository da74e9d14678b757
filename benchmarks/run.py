"""`unicl-bench`: measures each part against alternatives; README.md here explains the results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from unicl_fast.distributed.signals import Interrupted
from unicl_fast.system.program import EXIT_ABORTED, begin_program

PROGRAMS = {
    "run": ("diagnosis.run:Run", "what limits your run, what to change, and how long it takes"),
    "race": ("race.race:Race", "accuracy by images and CPU seconds, against open_clip's own loop"),
    "resume": (
        "resume.run:Resume",
        "kills and resumes loaders: samples lost, doubled, out of order",
    ),
    "input": ("input.run:Input", "images/s of the loader, against others and the limits"),
    "step": ("step.run:Step", "training steps, against open_clip's; by switch, part and memory"),
    "loss": ("loss.run:Loss", "tokens, targets, texts and the loss, against open_clip and others"),
    "gpu": ("gpu:Gpu", "a GPU: its kernels, tests, step and loss, nine minutes at a time"),
    "pack": ("packing:Pack", "packing, against webdataset, img2dataset and a bare loop"),
}
_HELP = """usage: unicl-bench PROGRAM [OPTIONS]

Measures a part against alternatives: medians over rounds in which all contestants take turns.
Contestants that disagree are not timed.

{programs}

unicl-bench PROGRAM --help explains its options."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    name, *options = (begin_program() if argv is None else list(argv)) or ["--help"]
    if name not in PROGRAMS:
        lines = "\n".join(f"  {one:8}{about}" for one, (_, about) in PROGRAMS.items())
        is_asked = name in ("-h", "--help")
        print(_HELP.format(programs=lines), file=sys.stdout if is_asked else sys.stderr)
        if not is_asked:
            print(f"\nunicl-bench: there is no program {name!r}", file=sys.stderr)
        sys.exit(0 if is_asked else 2)
    program = load_program(name).parse(options, prog=f"unicl-bench {name}")
    try:
        program.run()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"unicl-bench: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted):
        sys.exit(EXIT_ABORTED)


def load_program(name: str) -> type[Any]:
    """The class of a program; only its own module is imported, which loads its contestants."""
    module, _, kind = PROGRAMS[name][0].partition(":")
    found: type[Any] = getattr(importlib.import_module(f"unicl_fast.benchmarks.{module}"), kind)
    return found


if __name__ == "__main__":
    main()
