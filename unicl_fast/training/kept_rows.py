"""Stores rows that are encoded once (`dataset.feature_files`), all ranks together.

A run records what is stored in steps, which a kill cannot undo; an evaluation, of fewer images, at
its end. Rows of images and texts can also be found by hashes of these, so that only new ones are
encoded: a new state of the data copies known rows from older ones of its family. An older state is
removed once a newer one has nine tenths of it, or a shop that changes each day would fill the disk.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt64
from numpy.typing import NDArray

from unicl_fast.dataset.feature_files import (
    FeatureFile,
    KnownRows,
    bits_of,
    checksum_of,
    describe_rows,
    has_features,
    read_features,
    states,
)
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import (
    Ranks,
    from_rank_0,
    gather_objects,
    rank_0_alone,
    tensors_from_rank_0,
)
from unicl_fast.system.atomic_files import locked, make_folder, replacing
from unicl_fast.system.untrusted_files import open_regular

RECORDED_AT_ONCE = 16_384
"""Rows between two resume points: about 80 s of a small encoder on two cores."""
_COPIED_AT_ONCE = 4096
_REPLACED = 0.9  # part of a state that a newer one has to hold

Encode: TypeAlias = Callable[[Sequence[int]], Iterable[tuple[NDArray[np.int64], NDArray[Any]]]]
"""From the numbers of new items to this rank's part of them, with their rows [k width]."""


class Store:
    """Files of some keys that all ranks write rows to; made by `storing`.

    With `pwrite`: on a network drive, pages of a mapped file would overwrite neighbouring rows.
    """

    def __init__(self, folder: Path, found: Mapping[str, FeatureFile], ranks: Ranks) -> None:
        """`found` says on rank 0 which rows are stored: other ranks might see other files."""
        self._folder, self._ranks = folder, ranks
        self._checksums = {key: one.checksum for key, one in found.items()}
        masks = {key: torch.from_numpy(one.stored) for key, one in found.items()}
        self.stored = {key: one.numpy() for key, one in tensors_from_rank_0(masks, ranks).items()}
        """True for rows that are stored, or written by this rank, and for unreadable samples."""
        unreadable = {key: sorted(one.unreadable) for key, one in found.items()}
        self._unreadable = {key: set(one) for key, one in from_rank_0(unreadable, ranks).items()}
        self._fresh: dict[str, list[NDArray[np.int64]]] = {key: [] for key in self.stored}
        self._files, self._dtype = dict[str, tuple[int, int]](), ""

    @contextlib.contextmanager
    def writing(self, *, width: int, dtype: str) -> Iterator[None]:
        """Opens the files, which are made for rows of that width and type if needed."""
        self._dtype = dtype
        kind = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        with rank_0_alone(self._ranks):
            for key, stored in self.stored.items() if self._ranks.is_main else ():
                if not has_features(self._folder, key):
                    shape, path = (len(stored), width), self._folder / f"{key}.npy"
                    np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape).flush()
        with contextlib.ExitStack() as stack:
            for key in self.stored:
                file = open_regular(self._folder / f"{key}.npy", os.O_WRONLY)[0]
                stack.callback(os.close, file)
                self._files[key] = file, self._rows(key).offset
            yield

    def write(self, key: str, samples: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Writes `rows` [k width] for these samples."""
        file, offset = self._files[key]
        for sample, row in zip(samples.tolist(), rows, strict=True):
            data = row.tobytes()
            if os.pwrite(file, data, offset + sample * len(data)) != len(data):
                raise OSError(errno.ENOSPC, "features could not be written whole")
        self._keep(key, samples)

    def leave_out(self, key: str, samples: NDArray[np.int64]) -> None:
        """Says that the images of these samples cannot be read."""
        self._unreadable[key].update(samples.tolist())
        self._keep(key, samples)

    def _keep(self, key: str, samples: NDArray[np.int64]) -> None:
        self._fresh[key].append(samples[~self.stored[key][samples]])
        self.stored[key][samples] = True

    def _rows(self, key: str) -> np.memmap[Any, Any]:
        rows = np.load(self._folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        assert isinstance(rows, np.memmap)
        return rows

    def record(self) -> None:
        """Says on rank 0 what all ranks have stored, once it is on disk; all ranks call it."""
        for file, _ in self._files.values():
            os.fsync(file)
        mine: dict[str, Any] = {
            key: [_spans(self._fresh[key]), sorted(self._unreadable[key])] for key in self.stored
        }
        every = gather_objects(mine, self._ranks)
        with rank_0_alone(self._ranks):
            for key, stored in self.stored.items():
                spans = [np.arange(*span) for one in every for span in one[key][0]]
                fresh = np.unique(np.concatenate([np.zeros(0, np.int64), *spans]))
                stored[fresh] = True
                self._unreadable[key].update(*(one[key][1] for one in every))
                self._fresh[key] = []
                if self._ranks.is_main:
                    rows = self._rows(key)
                    self._checksums[key] += checksum_of(rows, fresh)
                    self._checksums[key] %= 2**64
                    described = FeatureFile(
                        rows=rows, dtype=self._dtype, stored=stored,
                        unreadable=frozenset(self._unreadable[key]), checksum=self._checksums[key],
                    )  # fmt: skip
                    describe_rows(self._folder, key, described)


def _spans(parts: Sequence[NDArray[np.int64]]) -> list[list[int]]:
    """Numbers as [start, stop]: a state that copies ten million rows sends few of these."""
    numbers = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [[int(group[0]), int(group[-1]) + 1] for group in groups if len(group)]


@contextlib.contextmanager
def storing(folder: Path, sizes: Mapping[str, int], ranks: Ranks) -> Iterator[Store]:
    """Files of `sizes` [N] rows by key, once no other process writes them; all ranks call it.

    Raises:
        SharedRefusal: stored features are damaged.
        OSError: the folder cannot be written.
    """
    found = dict[str, FeatureFile]()
    with contextlib.ExitStack() as stack:
        with refused_together(ranks), rank_0_alone(ranks):
            for key, size in sorted(sizes.items()) if ranks.is_main else ():
                make_folder(folder)
                path = folder / f".{key}.lock"
                stack.enter_context(locked(path, wait=True))
                stack.callback(path.unlink, missing_ok=True)
                found[key] = found_rows(folder, key, size)
        yield Store(folder, found, ranks)


def found_rows(folder: Path, key: str, size: int) -> FeatureFile:
    """Finds out which of `size` rows are stored, without checking them."""
    if has_features(folder, key):
        return read_features(folder, key, num_samples=size, check=False)
    stored = np.zeros(size, np.bool_)
    return FeatureFile(
        rows=np.zeros((size, 0)), dtype="", stored=stored, unreadable=frozenset(), checksum=0
    )


def all_stored(folder: Path, key: str, size: int) -> bool:
    """Whether all of `size` rows are stored; a run or a killed process can have stored some."""
    if not has_features(folder, key):
        return False
    return bool(read_features(folder, key, num_samples=size, check=False).stored.all())


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
    at_once: int = sys.maxsize,
    known: KnownRows | None = None,
) -> Float[np.ndarray, "n d"]:
    """The rows of all items, mapped from a file; all ranks call it and share the encoding.

    Rows are recorded after `at_once` new items. With `known`, which are those of the family, the
    items are others, and no state replaces another.

    Raises ValueError if stored rows are damaged, OSError if the folder cannot be written.
    """
    with refused_together(ranks):
        is_whole = ranks.is_main and all_stored(folder, key, len(items))
    if not from_rank_0(is_whole, ranks):
        with (
            storing(folder, {key: len(items)}, ranks) as store,
            store.writing(width=width, dtype=dtype),
        ):
            with refused_together(ranks), rank_0_alone(ranks):
                if ranks.is_main:
                    _copy_known(store, key, items, known or KnownRows(folder, family))
                    # later states find this one
                    with replacing(folder / f"{key}.{family}.items") as partial:
                        partial.write_bytes(items.tobytes())
            store.record()
            new = np.flatnonzero(~store.stored[key]).tolist()
            for start in range(0, len(new), at_once):
                for numbers, rows in encode(new[start : start + at_once]):
                    store.write(key, numbers, rows)
                store.record()
            if ranks.is_main and known is None:
                _remove_replaced(folder, key, family, items)
    with refused_together(ranks):
        # one rank is enough: the check reads the whole file
        size, check = len(items), ranks.is_main
        return read_features(folder, key, num_samples=size, check=check).rows


def _copy_known(store: Store, key: str, items: NDArray[np.uint64], known: KnownRows) -> None:
    """Copies the rows that older states have."""
    numbers = known.find(items)
    copied = np.flatnonzero((numbers >= 0) & ~store.stored[key])
    for start in range(0, len(copied), _COPIED_AT_ONCE):
        some = copied[start : start + _COPIED_AT_ONCE]
        store.write(key, some, bits_of(known.take(numbers[some])))


def _remove_replaced(folder: Path, key: str, family: str, items: NDArray[np.uint64]) -> None:
    for older, known in states(folder, family):
        if older != key and np.isin(known, items).mean() >= _REPLACED:
            path = folder / f".{older}.lock"
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                is_free = True  # also on a file system without locks
                with contextlib.suppress(OSError):
                    is_free = stack.enter_context(locked(path))
                # otherwise another process is adding rows
                for file in [*folder.glob(f"{older}.*"), path] if is_free else ():
                    file.unlink(missing_ok=True)
