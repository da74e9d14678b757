"""Reads ranges of a data set's shard files, and keeps them open.

Apart from `shards`, which knows what lies where: here are descriptors, and what a file system may
do to them while a job runs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unicl_fast.system.atomic_files import read_fully

# Beyond this many shards a file is opened for each read: descriptors are a scarce resource (often
# 1,024 a process), opening a local file costs a few microseconds.
_MAX_OPEN_SHARDS = 256


class ShardReader:
    """Files of one folder by their number. Reads from several threads at once are safe."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Nothing is opened before it is read."""
        self._paths = [folder / name for name in names]
        self._files: dict[int, int] = {}
        self._folder = folder
        self._closed = False

    def read_into(self, number: int, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Fills `buffer` from a file; returns how many bytes there were.

        Raises:
            OSError: the file cannot be read.
            ValueError: the reader has been closed.
        """
        if self._closed:
            raise ValueError(f"{self._folder} has been closed")
        file = self._files.get(number)
        if file is not None:
            try:
                return read_fully(file, buffer.data, offset=offset)
            except OSError as error:
                # A network file system forgets a file that was replaced: by its name it is there.
                # The descriptor is left alone, since another thread may be reading through it.
                if error.errno != errno.ESTALE:
                    raise
        keep = file is None and len(self._files) < _MAX_OPEN_SHARDS
        file = os.open(self._paths[number], os.O_RDONLY)
        if keep and self._files.setdefault(number, file) != file:
            keep = False  # another thread was first
        try:
            return read_fully(file, buffer.data, offset=offset)
        finally:
            if not keep:
                os.close(file)

    def descriptor(self, number: int) -> int:
        """A file's descriptor, for reads that are not made here; kept open until `close`.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the reader has been closed.
        """
        if self._closed:
            raise ValueError(f"{self._folder} has been closed")
        file = self._files.get(number)
        if file is None:
            opened = os.open(self._paths[number], os.O_RDONLY)
            file = self._files.setdefault(number, opened)
            if file != opened:  # another thread was first
                os.close(opened)
        return file

    def close(self) -> None:
        """Closes the files; reading afterwards is an error."""
        self._closed = True
        while self._files:
            os.close(self._files.popitem()[1])
