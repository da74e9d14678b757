"""Vectors stored under hashes of their images or texts, so that only new ones are encoded.

    KEY.npy, KEY.json    the rows of one state of the data (`dataset.feature_files`)
    KEY.FAMILY.items     uint64 [n]: a hash of each row's image or text

FAMILY is a hash of everything else that affects rows: weights, sizes, precision. A new state copies
known rows from older ones of its family. An older state is removed once a newer one has nine
tenths of it, or a shop that changes each day would fill the disk.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, UInt64
from numpy.typing import NDArray

from unicl_fast.dataset import feature_files
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers, rank_0_alone
from unicl_fast.system.atomic_files import replacing

_REPLACED = 0.9  # part of a state that a newer one has to hold

Encode: TypeAlias = Callable[[Sequence[int]], Iterable[tuple[NDArray[np.int64], NDArray[Any]]]]
"""From the numbers of new items to this rank's part of them, with their rows [k width]."""


def kept_rows(
    folder: Path,
    key: str,
    *,
    family: str,
    items: UInt64[np.ndarray, " n"],
    width: int,
    encode: Encode,
    ranks: Ranks,
    dtype: str = "float32",
) -> Float[np.ndarray, "n d"]:
    """The rows of all items, mapped from a file; all ranks call it and share the encoding.

    Raises ValueError if stored rows are damaged, OSError if the folder cannot be written.
    """
    if not from_rank_0(feature_files.has_features(folder, key), ranks):
        new: list[int] | None = None
        with contextlib.ExitStack() as stack:
            with refused_together(ranks), rank_0_alone(ranks):
                if ranks.is_main:
                    stack.enter_context(feature_files.sole_storer(folder, key))
                    if not feature_files.has_features(folder, key):  # stored by another process
                        shape = {"num_samples": len(items), "width": width}
                        feature_files.make_rows(folder, key, **shape, kind=np.dtype(dtype).str)
                        new = _copy_known(folder, key, family, items)
            new = from_rank_0(new, ranks)
            if new:
                with contextlib.closing(feature_files.RowsWriter(folder, key)) as writer:
                    for numbers, rows in encode(new):
                        writer.write(numbers, rows)
                    writer.flush()
            gather_integers(0, ranks)  # once all have written
            with rank_0_alone(ranks):
                if ranks.is_main and new is not None:
                    with replacing(folder / f"{key}.{family}.items") as partial:
                        partial.write_bytes(items.tobytes())
                    every = np.ones(len(items), np.bool_)
                    feature_files.seal_rows(folder, key, dtype=dtype, stored=every, unreadable=())
                    _remove_replaced(folder, key, family, items)
    with refused_together(ranks):
        # one rank is enough: the check reads the whole file
        size, check = len(items), ranks.is_main
        return feature_files.read_features(folder, key, num_samples=size, check=check).rows


def _states(folder: Path, family: str) -> Iterator[tuple[str, NDArray[np.uint64]]]:
    """Keys and items of all complete states of a family, the newest first."""
    for path in sorted(
        folder.glob(f"*.{family}.items"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    ):
        key = path.name.partition(".")[0]
        if feature_files.has_features(folder, key):
            yield key, np.fromfile(path, np.uint64)


def _copy_known(folder: Path, key: str, family: str, items: NDArray[np.uint64]) -> list[int]:
    """Copies the rows of items that older states have; returns the numbers of all others."""
    new = np.arange(len(items))
    with contextlib.closing(feature_files.RowsWriter(folder, key)) as writer:
        for older, known in _states(folder, family):
            if len(new) and len(known):
                rows = feature_files.read_features(folder, older, num_samples=len(known)).rows
                order, last = known.argsort(), len(known) - 1
                places = order[known.searchsorted(items[new], sorter=order).clip(max=last)]
                is_known = known[places] == items[new]
                writer.write(new[is_known], rows[places[is_known]])
                new = new[~is_known]
    return new.tolist()


def _remove_replaced(folder: Path, key: str, family: str, items: NDArray[np.uint64]) -> None:
    for older, known in _states(folder, family):
        if older != key and np.isin(known, items).mean() >= _REPLACED:
            for path in folder.glob(f"{older}.*"):
                path.unlink(missing_ok=True)
