"""The commands of `unicl-eval` by name. A new one needs a file in this folder and a line here."""

from importlib import import_module
from typing import Any

COMMANDS = {
    "zero-shot": "zero_shot:ZeroShot",
    "linear-probe": "linear_probe:LinearProbe",
    "knn": "knn:Knn",
    "retrieval": "retrieval:Retrieval",
    "bases": "bases:Bases",
    "classify": "classify:Classify",
    "embed": "embed:Embed",
    "search": "search:Search",
    "serve": "serve:Serve",
}
"""File and class of each, in the order that the help shows."""


def command_classes() -> dict[str, Any]:
    """Subclasses of `command.Command` by name."""
    places = {name: place.split(":") for name, place in COMMANDS.items()}
    return {
        name: getattr(import_module(f"{__package__}.{module}"), attribute)
        for name, (module, attribute) in places.items()
    }


def name_of(command: object) -> str:
    """The name of a command, which is the `protocol` of its results."""
    return next(name for name, kind in command_classes().items() if kind is type(command))
