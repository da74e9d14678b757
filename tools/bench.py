"""`unicl-bench`: finds the limit of a run, and starts benchmarks against other libraries.

`run` is part of the package. The benchmarks are not installed: they are in benchmarks/ of a
checkout, where this program finds them.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import unicl_fast
from unicl_fast.distributed.signals import Interrupted
from unicl_fast.system.program import EXIT_ABORTED, begin_program
from unicl_fast.system.wording import print_text, shorten_message

PROGRAMS = {
    "run": "what limits your run, what to change, and how long it takes",
    "race": "accuracy by images and CPU seconds, against open_clip's own loop",
    "resume": "kills and resumes loaders: samples lost, doubled, out of order",
    "input": "images/s of the loader, against others and the limits",
    "step": "training steps, against open_clip's; by switch, part and memory",
    "loss": "tokens, targets, texts and the loss, against open_clip and others",
    "gpu": "a GPU: its kernels, tests, step and loss, nine minutes at a time",
    "pack": "packing, against webdataset, img2dataset and a bare loop",
}
_HELP = """usage: unicl-bench PROGRAM [OPTIONS]

Measures your run, or a part against alternatives: medians over rounds in which all contestants take
turns. Contestants that disagree are not timed.

{programs}

All but `run` need a checkout. unicl-bench PROGRAM --help explains its options."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input, and for a benchmark without a checkout."""
    name, *options = (begin_program() if argv is None else list(argv)) or ["--help"]
    if name not in PROGRAMS:
        help_ = _HELP.format(programs="\n".join(f"  {n:8}{text}" for n, text in PROGRAMS.items()))
        if name in ("-h", "--help"):
            print(help_)
            sys.exit(0)
        print(f"{help_}\n\nunicl-bench: there is no program {name!r}", file=sys.stderr)
        sys.exit(2)
    try:
        load_program(name).parse(options, prog=f"unicl-bench {name}").run()
    except (ValueError, OSError, RuntimeError) as error:
        print_text(shorten_message(f"unicl-bench: {error}"), sys.stderr)
        sys.exit(2)
    except Interrupted:
        sys.exit(EXIT_ABORTED)


def load_program(name: str) -> type[Any]:
    """A program's class; FileNotFoundError for a benchmark without a checkout."""
    if name == "run":
        from .diagnose.run import Run

        return Run
    folders = [str(Path(unicl_fast.__file__).resolve().parents[1]), os.getcwd()]
    found = [one for one in folders if Path(one, "benchmarks", "harness.py").is_file()]
    if not found:
        raise FileNotFoundError(
            "the benchmarks are not installed with the package: clone the repository of unicl_fast "
            "and run this program in the checkout"
        )
    if found[0] not in sys.path:
        sys.path.append(found[0])  # last, so that unicl_fast stays the installed one
    program: type[Any] = importlib.import_module("benchmarks").load_program(name)
    return program


if __name__ == "__main__":
    main()
