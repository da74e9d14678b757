"""The commands of `unicl-eval` by name. A new one is a file in this folder and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

COMMANDS = {
    "zero-shot": "zero_shot:ZeroShot",
    "linear-probe": "linear_probe:LinearProbe",
    "knn": "knn:Knn",
    "retrieval": "retrieval:Retrieval",
    "classify": "classify:Classify",
    "embed": "embed:Embed",
    "search": "search:Search",
    "serve": "serve:Serve",
}
"""File and class of each, in the order of the help."""


def command_classes() -> dict[str, Any]:
    """The class of each command, a subclass of `command.ModelCommand`, by name."""
    found = {}
    for name, place in COMMANDS.items():
        module, _, attribute = place.partition(":")
        found[name] = getattr(import_module(f"{__package__}.{module}"), attribute)
    return found


def name_of(command: object) -> str:
    """The name of a command, which results keep as their protocol."""
    return next(name for name, kind in command_classes().items() if kind is type(command))
