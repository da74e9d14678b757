"""Numba's decorators with a cache that notices changes, and kernels that read files.

Numba considers a kernel on disk fresh until its own file changes, although the kernel contains code
of other modules. So the cache folder's name is a hash of all files of this package that the file
imports, directly or not.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, TypeVar, overload

import llvmlite
import numba
import numpy as np
from numba import cfunc, njit, types

F = TypeVar("F", bound=Callable[..., Any])
logger = logging.getLogger(__name__)
_config: Any = numba.config  # its attributes are made as it is imported

_MOST_FOLDERS = 8  # the last used versions of a file that are kept
_NAME = re.compile(r"[.\w]+")
_COMMENT = re.compile(r"#.*")
# Also matches inside a text, which does no harm.
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]+(\([^)]*\)|.*)|import[ \t]+(.*))", re.M
)


@overload
def kernel(function: F, /, **options: Any) -> F: ...
@overload
def kernel(**options: Any) -> Callable[[F], F]: ...
def kernel(function: Any = None, /, **options: Any) -> Any:
    """Compiles by `numba.njit`, without the GIL, and caches on disk; options are Numba's."""
    if function is None:
        return lambda function: kernel(function, **options)
    return _compile(function, functools.partial(njit, nogil=True, **options))


def c_function(*arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Returns a decorator like `numba.cfunc` whose result is cached; C code calls its `address`."""
    decorator = functools.partial(cfunc, types.void(*arguments))
    return lambda function: _compile(function, decorator)


def _compile(function: Any, decorator: Callable[..., Any]) -> Any:
    # Numba's names in machine code do not tell closures with different values apart, and a process
    # could load two of them that others have cached under one name
    for cell in function.__closure__ or ():
        function.__qualname__ += f"_{cell.cell_contents}"
    before, above = _config.CACHE_DIR, cache_folder()
    if above is not None:  # for this function only: other packages keep theirs elsewhere
        folder = folder_of(above, function.__module__, function.__code__.co_filename)
        _config.CACHE_DIR = str(folder)
    try:
        return decorator(cache=above is not None)(function)
    finally:
        _config.CACHE_DIR = before


@functools.cache
def cache_folder() -> Path | None:
    """Returns the folder of all compiled kernels, which is made if needed; None if impossible."""
    if getattr(_config, "CACHE_LOCATOR_CLASSES", ""):
        return None  # a variable makes Numba cache them elsewhere, where they would become stale
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # NUMBA_CACHE_DIR comes first
        return _make_private(Path(_config.CACHE_DIR or home / "unicl_fast", "numba"))
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        reason = error
    try:
        folder = _make_private(Path(tempfile.gettempdir(), f"unicl_fast-{os.getuid()}"))
    except OSError as error:
        logger.warning(
            "every process compiles its kernels anew, for some 20 s, since they cannot be kept "
            "(%s; %s): set NUMBA_CACHE_DIR to a folder of this user", reason, error,
        )  # fmt: skip
        return None
    logger.warning(
        "compiled kernels are kept in %s (%s): set NUMBA_CACHE_DIR to a folder of this user that "
        "lasts longer", folder, reason,
    )  # fmt: skip
    return folder


def _make_private(folder: Path) -> Path:
    """Makes a folder that only this user can write to (kernels are code), or raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()  # a link in /tmp may be somebody else's
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by other users")
    return folder


@functools.cache
def folder_of(above: Path, module: str, file: str) -> Path:
    """Makes the folder for the kernels of this version of a file, and removes old ones."""
    folder = above / f"{module}-{_hash_code(module, Path(file))}"
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process removes them too
            folders = sorted(above.glob(f"{module}-*"), key=lambda path: path.stat().st_mtime)
            for old in folders[:-_MOST_FOLDERS]:
                shutil.rmtree(old, ignore_errors=True)  # Numba makes one in use again
    os.utime(folder)
    return folder


def _hash_code(module: str, file: Path) -> str:
    """Hashes a file, the files of this package that it imports, and the compilers' versions."""
    # by content (15 ms for all kernels): two versions can agree in sizes and times
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    found, waiting = {module: file}, [(module, file)]
    while waiting:
        for name in _read(*waiting.pop())[1]:
            if name not in found and (path := _file_of(name)) is not None:
                found[name] = path
                waiting.append((name, path))
    for name, path in sorted(found.items()):
        digest.update(name.encode() + _read(name, path)[0])
    return digest.hexdigest()[:16]


@functools.cache
def _read(module: str, file: Path) -> tuple[bytes, frozenset[str]]:
    """Returns a file's digest and all names in its import statements, which can be modules."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    content = file.read_bytes()
    imported = set()
    for source, names, plain in _IMPORT.findall(_COMMENT.sub("", content.decode())):
        imported.update(_NAME.findall(plain))
        if source:
            with contextlib.suppress(ImportError, ValueError):  # a sentence that only looks so
                base = resolve_name(source, package)
                imported |= {base, *(f"{base}.{name}" for name in _NAME.findall(names))}
    return hashlib.sha256(content).digest(), frozenset(imported)


@functools.cache
def _file_of(module: str) -> Path | None:
    """Returns the file of a module of this package; None for other names."""
    package, *parts = module.split(".")
    if package != __name__.partition(".")[0]:
        return None
    spec = find_spec(".".join([package, *parts[:1]]))  # a checkout has rooms outside the package
    if spec is None:
        return None
    if len(parts) < 2:
        return Path(spec.origin) if spec.origin else None
    places = spec.submodule_search_locations or []
    paths = [Path(place).joinpath(*parts[1:]) for place in places]
    found = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py"))]
    return next(filter(Path.is_file, found), None)


# The C library's function, which a compiled loop can call.
_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@kernel
def pread_ranges(files: Any, offsets: Any, sizes: Any, buffer: Any, starts: Any) -> Any:
    """Reads sizes[i] bytes at offsets[i] of a file to buffer[starts[i]], uint8 [n].

    One call, without the GIL: 0.8 us a range of 3 kB, and 1.7 with `os.preadv`. files[i], int32, is
    a descriptor, or negative without one. The caller makes sure that the ranges fit into the
    buffer. Returns bool [k]: whether each range is complete; others have undefined content.
    """
    # not a mapped file: if one shrinks or vanishes, a range is missing instead of a bus error
    whole = np.empty(offsets.size, np.bool_)
    for i in range(offsets.size):
        target = buffer.ctypes.data + starts[i]
        whole[i] = files[i] >= 0 and _pread(files[i], target, sizes[i], offsets[i]) == sizes[i]
    return whole
