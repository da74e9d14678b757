"""Files and folders that are there whole or not at all, and never in the place of others."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def require_new(path: Path) -> None:
    """Refuses a path that something has already; an empty folder is let pass.

    Raises:
        ValueError: there is something.
    """
    if path.is_symlink() or (path.exists() and not _is_empty_folder(path)):
        raise ValueError(f"{path} is there already: name a new one, or remove it first")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends without an error.

    Raises:
        ValueError: something is there already.
        OSError: it cannot be written.
    """
    with _aside(path) as aside:
        aside.mkdir()
        yield aside


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As `new_folder`, of one file."""
    with _aside(path) as aside:
        yield aside


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    _remove(aside)
    try:
        yield aside
        if path.is_dir():
            path.rmdir()
        aside.rename(path)
    finally:
        _remove(aside)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Strict JSON, which has no infinity."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file whose tensors share no memory.

    Raises:
        OSError: it cannot be written.
    """
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(copies, path, metadata={"format": "pt"})  # the hub's readers ask for this word
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
