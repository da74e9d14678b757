"""Numba's decorators as this package uses them: compiled once for a machine, and kept on disk.

What Numba keeps of a function is good for it until the function's own file changes. Functions,
constants and enumerations of other modules are part of the compiled code too, though: after an
update that changes only those, it would go on with what they used to be, and this machine would
plan other batches than the next one. Here the stamp of what is kept holds them as well: numbers,
enumerations and kernels that a module imports by their names, at its top.
"""

from __future__ import annotations

import enum
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numba import cfunc, config, njit, types
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])

_stamps: dict[str, str] = {}
"""Of a module with kernels, by its name: a digest of its text and of what it imports by name."""
_VALUES = (bool, int, float, str, bytes, tuple, np.generic)
_cache: Any = caching.CacheImpl
_locators: list[Any] = list(getattr(_cache, "_locator_classes", ()))
"""Numba's classes that know places for what is kept."""
# They are no part of Numba's interface. Where there are none, or others are asked for by an
# environment variable, nothing is kept, rather than something that may be stale.
_is_kept = bool(_locators) and not getattr(config, "CACHE_LOCATOR_CLASSES", "")


@overload
def kernel(function: F, /, **options: Any) -> F: ...
@overload
def kernel(**options: Any) -> Callable[[F], F]: ...
def kernel(function: Any = None, /, **options: Any) -> Any:
    """`numba.njit` with a result that is kept, and without Python's lock.

    Args:
        function: what to compile; left out, this gives a decorator.
        **options: more of Numba's, such as `inline` or `fastmath`.
    """
    if function is None:
        return lambda function: kernel(function, **options)
    _prepare(function)
    return njit(cache=_is_kept, nogil=True, **options)(function)


def c_function(*arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """`numba.cfunc` with a result that is kept: its `address` is for C code to call.

    Args:
        *arguments: Numba's types of its arguments; it returns nothing.
    """

    def decorate(function: Callable[..., None]) -> Any:
        _prepare(function)
        return cfunc(types.void(*arguments), cache=_is_kept)(function)

    return decorate


def _prepare(function: Any) -> None:
    """Computes its module's stamp, of all that the module has imported by now."""
    # Numba's names of functions in machine code do not tell apart what closures hold, and what
    # two processes have kept under one name may meet in a third.
    for cell in function.__closure__ or ():
        function.__qualname__ += f"_{cell.cell_contents}"
    name = function.__module__
    module = sys.modules[name]
    assert module.__file__ is not None
    digest = hashlib.sha256(Path(module.__file__).read_bytes())
    for key, value in sorted(vars(module).items()):
        if key.startswith("__"):
            continue
        if isinstance(value, _VALUES):
            digest.update(f"{key}={value!r};".encode())
        elif isinstance(value, enum.EnumType):
            digest.update(f"{key}={dict(value.__members__)!r};".encode())
        else:
            origin = getattr(value, "__module__", None)
            if origin != name and origin in _stamps:
                digest.update(f"{key} of {origin}={_stamps[origin]};".encode())
    _stamps[name] = digest.hexdigest()


class _Locator:
    """Numba's place for what is kept of a function; for ours with our stamp beside its own."""

    @staticmethod
    def from_function(function: Callable[..., Any], file: str) -> Any:
        stamp = _stamps.get(function.__module__)
        if stamp is None:
            return None  # not ours: Numba goes on to the next one
        found = (locator.from_function(function, file) for locator in _locators)
        locator = next((each for each in found if each is not None), None)
        if locator is not None:
            own_stamp = locator.get_source_stamp
            locator.get_source_stamp = lambda: (own_stamp(), stamp)
        return locator


_cache._locator_classes = [_Locator, *_locators]
