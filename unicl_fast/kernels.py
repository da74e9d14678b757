"""Numba's decorators as this package uses them: compiled once for a machine, and kept on disk.

What Numba keeps of a function is good for it until the function's own file changes. Functions,
constants and enumerations of other modules are part of the compiled code too, though: after an
update that changes only those, it would go on with what they used to be, and this machine would
plan other batches than the next one. Here the stamp of what is kept holds them as well.
"""

from __future__ import annotations

import enum
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numba import cfunc, njit, types
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])

_stamps: dict[str, str] = {}
"""Of each module with kernels, by name: of its text and of all that it takes from others."""
_VALUES = (bool, int, float, str, bytes, tuple, np.generic)
_cache: Any = caching.CacheImpl
_homes: list[Any] = list(getattr(_cache, "_locator_classes", ()))
"""Classes that know places for what is kept. No part of Numba's interface: without them nothing
is kept, rather than something that may be stale."""


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
    _take_stamp(function)
    return njit(cache=bool(_homes), nogil=True, **options)(function)


def c_function(*arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """`numba.cfunc` with a result that is kept: its `address` is for C code to call.

    Args:
        *arguments: Numba's types of its arguments; it returns nothing.
    """

    def decorate(function: Callable[..., None]) -> Any:
        _take_stamp(function)
        return cfunc(types.void(*arguments), cache=bool(_homes))(function)

    return decorate


def _take_stamp(function: Callable[..., Any]) -> None:
    """Computes its module's stamp, of what the module has imported by now."""
    name = function.__module__
    file = sys.modules[name].__file__
    assert file is not None
    digest = hashlib.sha256(Path(file).read_bytes())
    for key, value in sorted(vars(sys.modules[name]).items()):
        if key.startswith("__"):
            continue
        if isinstance(value, _VALUES):
            digest.update(f"{key}={value!r};".encode())
        elif isinstance(value, enum.EnumType):
            digest.update(f"{key}={list(value)!r};".encode())
        else:
            home = getattr(value, "__module__", None)
            if home != name and home in _stamps:
                digest.update(f"{key} of {home}={_stamps[home]};".encode())
    _stamps[name] = digest.hexdigest()


class _Locator:
    """Numba's place for what is kept of a function; for ours with our stamp beside its own."""

    @staticmethod
    def from_function(function: Callable[..., Any], file: str) -> Any:
        stamp = _stamps.get(function.__module__)
        if stamp is None:
            return None  # not ours: Numba goes on to the next one
        found = (home.from_function(function, file) for home in _homes)
        locator = next((each for each in found if each is not None), None)
        if locator is not None:
            own_stamp = locator.get_source_stamp
            locator.get_source_stamp = lambda: (own_stamp(), stamp)
        return locator


_cache._locator_classes = [_Locator, *_homes]
