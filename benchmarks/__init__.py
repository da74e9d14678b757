"""Benchmarks against other libraries, started by `unicl-bench`; README.md explains the results."""

import importlib
from typing import Any

_PROGRAMS = {
    "race": "race.race:Race",
    "resume": "resume.run:Resume",
    "input": "input.run:Input",
    "step": "step.run:Step",
    "loss": "loss.run:Loss",
    "gpu": "gpu:Gpu",
    "pack": "packing:Pack",
}


def load_program(name: str) -> type[Any]:
    """The class of a program; imports only its own module, which loads its contestants."""
    module, _, kind = _PROGRAMS[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    return found
