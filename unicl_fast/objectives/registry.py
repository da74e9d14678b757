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
_UNTRAINED = {"none": "objective:NoObjective"}
_LEFT = ("supcon",)


def objective_class(name: object = next(iter(OBJECTIVES))) -> type[Any]:
    """The class of an objective; ValueError for an unknown name."""
    known = OBJECTIVES | _UNTRAINED
    if name in _LEFT:
        raise ValueError(
            f"objective.name={name} has left, with second views of images: train with one of "
            f"{', '.join(OBJECTIVES)}, or use the version that wrote it"
        )
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"objective.name must be one of {', '.join(OBJECTIVES)}, not {name!r}")
    module, _, attribute = known[name].partition(":")
    found: type[Any] = getattr(import_module(f"{__package__}.{module}"), attribute)
    return found


def make_objective(name: str = next(iter(OBJECTIVES)), **options: Any) -> Any:
    """An objective, as `make_objective("ce", positives="text")`; TypeError, ValueError if wrong."""
    return objective_class(name)(**options)


def list_objectives() -> str:
    """A line for each objective, for the help."""
    width = max(map(len, OBJECTIVES)) + 3
    return "\n".join(f"{name:{width}}{objective_class(name).about}" for name in OBJECTIVES)
