"""Numba's decorators as this package uses them, and a kernel that reads files.

Kernels are compiled once for a machine, and kept on disk. Numba takes what it keeps of a function
for fresh until the function's own file changes. But code of other modules is part of it too: after
an update of those alone, a stale kernel would plan other batches here than on the next machine. So
kernels are kept in a folder that is named by a hash of all code that can be part of them. It must
belong to this user alone, since loading a kept kernel runs code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, overload

import llvmlite
import numba
import numpy as np
from numba import cfunc, njit, types

F = TypeVar("F", bound=Callable[..., Any])
logger = logging.getLogger(__name__)
_config: Any = numba.config  # its attributes are made as it is imported

# Rooms of which no code can be part of a kernel (test_layout.py): editing them compiles nothing.
_ROOMS_ABOVE = {"checkpoints", "training", "packing", "conversion", "evaluation"}
_MOST_FOLDERS = 16
"""How many are kept, the last used ones: of several checkouts, and of code that is being edited."""


@overload
def kernel(function: F, /, **options: Any) -> F: ...
@overload
def kernel(**options: Any) -> Callable[[F], F]: ...
def kernel(function: Any = None, /, **options: Any) -> Any:
    """Compiles by `numba.njit` without Python's lock, and keeps it on disk; options are Numba's."""
    if function is None:
        return lambda function: kernel(function, **options)
    return _compile(function, functools.partial(njit, nogil=True, **options))


def c_function(*arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Returns a decorator like `numba.cfunc` whose result is kept; its `address` is for C code."""
    decorator = functools.partial(cfunc, types.void(*arguments))
    return lambda function: _compile(function, decorator)


def _compile(function: Any, decorator: Callable[..., Any]) -> Any:
    # Numba's names of functions in machine code do not tell apart what closures hold, and what
    # two processes have kept under one name may meet in a third.
    for cell in function.__closure__ or ():
        function.__qualname__ += f"_{cell.cell_contents}"
    before, folder = _config.CACHE_DIR, cache_folder()
    _config.CACHE_DIR = str(folder or "")  # for this function; those of others stay elsewhere
    try:
        return decorator(cache=folder is not None)(function)
    finally:
        _config.CACHE_DIR = before


@functools.cache
def cache_folder() -> Path | None:
    """Finds or makes the folder for this version of the code; None if kernels cannot be kept."""
    if getattr(_config, "CACHE_LOCATOR_CLASSES", ""):
        return None  # an environment variable has Numba keep them where they would become stale
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # NUMBA_CACHE_DIR comes first
        return _make_folder(Path(_config.CACHE_DIR or home / "unicl_fast" / "numba"))
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        reason = error
    try:
        private = Path(tempfile.gettempdir(), f"unicl_fast-{os.getuid()}")
        private.mkdir(mode=0o700, exist_ok=True)
        _require_own(private)  # who can write there can put another folder in the place of ours
        folder = _make_folder(private)
    except OSError as error:
        logger.warning(
            "every process compiles its kernels anew, for some 20 s, since they cannot be kept "
            "(%s; %s): set NUMBA_CACHE_DIR to a folder of this user", reason, error,
        )  # fmt: skip
        return None
    logger.warning(
        "compiled kernels are kept in %s (%s): set NUMBA_CACHE_DIR to a folder of this user that "
        "lasts longer", folder.parent, reason,
    )  # fmt: skip
    return folder


def _make_folder(above: Path) -> Path:
    """Makes the folder of this version in `above`.

    Raises:
        OSError: it cannot be made, or other users can write there.
    """
    folder = above / f"unicl_fast-{_hash_code()}"
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process removes them too
            folders = sorted(above.glob("unicl_fast-*"), key=lambda path: path.stat().st_mtime)
            for old in folders[:-_MOST_FOLDERS]:
                shutil.rmtree(old, ignore_errors=True)  # Numba makes one in use again
    os.utime(folder)
    _require_own(folder)
    return folder


def _require_own(folder: Path) -> None:
    status = folder.lstat()  # a link in /tmp may be somebody else's
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by other users")


def _hash_code() -> str:
    """Hashes the code that can be part of a kernel, and the versions of what compiles it.

    By content, in 5 ms: after `git checkout` or `pip install` two versions may agree in sizes and
    times. Numba itself tells processors and versions of Python apart.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for file in sorted(source_files(without=_ROOMS_ABOVE)):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def source_files(*, without: Collection[str]) -> set[Path]:
    """Finds the Python files of the library and of pipelines/, without some rooms."""
    package = Path(__file__).parents[1]
    rooms = [path for path in package.iterdir() if path.name not in without]
    pipelines = find_spec("unicl_fast.pipelines")  # it may lie beside the package, in a checkout
    rooms += map(Path, (pipelines and pipelines.submodule_search_locations) or ())
    files = {file for room in rooms for file in (room.rglob("*.py") if room.is_dir() else [room])}
    return {file for file in files if file.suffix == ".py"}


# The C library's function, which a compiled loop can call.
_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@kernel
def pread_rows(file: Any, offsets: Any, rows: Any, positions: Any) -> Any:
    """Reads bytes of a file from offsets[i] on into rows[positions[i]], a whole row of uint8 each.

    All in one call without Python's lock, and by `pread` instead of a mapped file: one that shrinks
    or vanishes under a running job is then a missing row instead of a bus error. Returns bool [k],
    whether a row came whole; the content of one that did not is undefined.
    """
    size = rows.shape[1]
    whole = np.empty(offsets.size, np.bool_)
    for i in range(offsets.size):
        target = rows[positions[i]]
        whole[i] = _pread(file, target.ctypes.data, size, offsets[i]) == size
    return whole
