"""Starts `unicl-bench gpu` from a bare checkout: `python benchmarks/gpu --out REPORT`.

The folders next to unicl_fast/ get their import names here. Packages that only annotate and check
(jaxtyping, msgspec) or are not called by what runs here (xxhash, ftfy, regex) get stand-ins.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

_CHECKOUT = Path(__file__).resolve().parents[2]


def name_the_rooms() -> None:
    """Makes unicl_fast.benchmarks and its neighbours importable, where no install has done so."""
    # started as a folder, Python searches it first, where any module of ours could hide another
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    if find_spec("unicl_fast") is None:
        sys.path.insert(0, str(_CHECKOUT))
    if find_spec("unicl_fast.benchmarks") is None:
        importlib.import_module("unicl_fast").__path__.append(str(_CHECKOUT))


def stand_in_for_missing() -> None:
    """Puts a stand-in into `sys.modules` for each missing package that this program can spare."""
    stand_ins: dict[str, dict[str, Any]] = {
        "jaxtyping": dict.fromkeys(("Float", "Int", "UInt8"), _Annotation()),
        "msgspec": {
            "Meta": _Limits,
            "convert": lambda value, kind: value,  # the settings are our own
            "ValidationError": ValueError,
        },
        "xxhash": {},
        "ftfy": {},
        "regex": {},
    }
    for name, attributes in stand_ins.items():
        if not _is_installed(name):
            sys.modules[name] = _StandIn(name, attributes)


def _is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


class _Annotation:
    def __getitem__(self, shape: object) -> _Annotation:
        return self


class _Limits:
    def __init__(self, **limits: float) -> None:
        pass


class _StandIn(types.ModuleType):
    is_stand_in = True

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # for those who ask `find_spec`
        self.__dict__.update(attributes)

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise ModuleNotFoundError(f"{self.__name__}.{attribute} is needed: install {self.__name__}")


def main(arguments: list[str]) -> int:
    """Runs the stages; or `pytest` with the rest of the arguments, as the stage of tests does."""
    if arguments[:1] == ["pytest"]:
        return int(importlib.import_module("pytest").main(arguments[1:]))
    importlib.import_module("unicl_fast.benchmarks.run").main(["gpu", *arguments])
    return 0


if __name__ == "__main__":
    name_the_rooms()
    stand_in_for_missing()
    sys.exit(main(sys.argv[1:]))
