"""The objectives by name. A new one is a file in this folder and a line here."""

from importlib import import_module
from typing import Any

OBJECTIVES = {
    "unicl": "unicl:UniCLObjective",
    "clip": "unicl:CLIPObjective",
    "sigmoid": "sigmoid:SigmoidObjective",
    "siglip": "sigmoid:SigLIPObjective",
    "ce": "cross_entropy:CrossEntropyObjective",
}
"""File and class of each; the first is the default."""


def objective_class(name: object = next(iter(OBJECTIVES))) -> type[Any]:
    """The class of an objective; ValueError for an unknown name."""
    if name == "supcon":
        raise ValueError(
            "objective.name=supcon has left, with second views of images: choose one of "
            f"{', '.join(OBJECTIVES)}"
        )
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective.name must be one of {', '.join(OBJECTIVES)}, not {name!r}")
    module, _, attribute = OBJECTIVES[name].partition(":")
    found: type[Any] = getattr(import_module(f"{__package__}.{module}"), attribute)
    return found


def make_objective(name: str = next(iter(OBJECTIVES)), **options: Any) -> Any:
    """An objective, as `make_objective("ce", positives="text")`; TypeError, ValueError if wrong."""
    return objective_class(name)(**options)


def list_objectives() -> str:
    """A line for each objective, for the help."""
    width = max(map(len, OBJECTIVES)) + 3
    return "\n".join(f"{name:{width}}{objective_class(name).about}" for name in OBJECTIVES)
