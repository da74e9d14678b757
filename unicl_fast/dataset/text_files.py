"""Features of a frozen text encoder, found by a text's tokens.

    text-KEY-XXH3.safetensors   tokens int32 [m l], padded with 0, and features [m w], unrounded

KEY is a hash of everything that affects the features; XXH3 is the file's own checksum. A file is
never changed: who needs texts that no file has encodes them and adds a file, so that a killed
process loses the last file at most, and processes need not wait for each other.
"""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unicl_fast.system.atomic_files import flush_to_disk, make_folder
from unicl_fast.system.checksums import file_checksum
from unicl_fast.text.token_rows import (
    TokenArray,
    find_rows,
    hash_rows,
    make_table,
    position_factors,
    unique_rows,
)


class TextFeatures:
    """The features of texts in some files of one key."""

    def __init__(self, files: Sequence[dict[str, Tensor]]) -> None:
        """`files` have tokens and features, as the files on disk."""
        longest = max((one["tokens"].shape[1] for one in files), default=1)
        rows = [_padded(one["tokens"].numpy().view(np.uint32), longest) for one in files]
        tokens = np.concatenate(rows) if rows else np.zeros((0, 1), np.uint32)
        self._table = make_table(len(tokens))
        hashes = hash_rows(tokens, position_factors(tokens.shape[1]))
        self._first, _, _, self._distinct, _ = unique_rows(tokens, hashes, self._table)
        self._features = [one["features"] for one in files]  # mapped from their files
        self._starts = np.cumsum([0, *map(len, rows)])

    def find(self, tokens: TokenArray) -> NDArray[np.int64]:
        """The number int64 [k] of each text [k l], padded with 0; -1 if it is not stored."""
        rows = np.ascontiguousarray(tokens, np.uint32)
        hashes = hash_rows(rows, position_factors(rows.shape[1]))
        return np.asarray(find_rows(rows, hashes, self._table, self._distinct))

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """The features [k w] of texts by the numbers of `find`."""
        places = self._first[numbers]
        files = np.searchsorted(self._starts, places, side="right") - 1
        found = self._features[0].new_empty(len(places), self._features[0].shape[1])
        for file in np.unique(files).tolist():
            mine = np.flatnonzero(files == file)
            found[mine] = self._features[file][places[mine] - self._starts[file]]
        return found


def distinct_texts(*parts: TokenArray) -> TokenArray:
    """The distinct rows of texts [k l], padded with 0, by length and then by their tokens.

    Parts can be of different l; the result has the largest.
    """
    longest = max(one.shape[1] for one in parts)
    rows = np.concatenate([_padded(np.asarray(one, np.uint32), longest) for one in parts])
    hashes = hash_rows(rows, position_factors(rows.shape[1]))
    *_, distinct, lengths = unique_rows(rows, hashes, make_table(len(rows)))
    order = np.lexsort((*distinct.T[::-1], lengths))
    return np.asarray(distinct[order])


def lengths_of(tokens: TokenArray) -> NDArray[np.int64]:
    """The number of tokens int64 [k] of texts [k l], padded with 0."""
    ends = np.where(tokens, np.arange(1, tokens.shape[1] + 1), 0)
    return np.asarray(ends.max(axis=1, initial=0), np.int64)


def read_text_features(folder: Path, key: str, *, check: bool = True) -> TextFeatures:
    """All features of texts that are stored under a key; ValueError if a file is damaged."""
    files = []
    for path in sorted(folder.glob(f"text-{key}-*.safetensors")):
        try:
            if check and (found := file_checksum(path)) != path.stem.rpartition("-")[2]:
                raise ValueError(f"its xxh3 is {found}, its name says another")
            tensors = load_file(path)
            kinds = tensors["tokens"].dtype, tensors["features"].ndim, len(tensors["features"])
            if kinds != (torch.int32, 2, len(tensors["tokens"])):
                raise ValueError(f"it holds {kinds}")
        except (ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"the stored features {path} are damaged: {error}; remove it, and they are made "
                "again"
            ) from error
        files.append(tensors)
    return TextFeatures(files)


def write_text_features(folder: Path, key: str, tokens: TokenArray, features: Tensor) -> None:
    """Adds a file with the features [m w] of texts [m l]; complete or absent."""
    make_folder(folder)
    aside = folder / f".text-{key}-{secrets.token_hex(4)}.partial"
    try:
        rows = torch.from_numpy(np.ascontiguousarray(tokens, np.uint32).view(np.int32))
        save_file({"tokens": rows, "features": features.contiguous()}, aside)
        flush_to_disk(aside)
        aside.rename(folder / f"text-{key}-{file_checksum(aside)}.safetensors")
    finally:
        aside.unlink(missing_ok=True)


def _padded(rows: NDArray[Any], length: int) -> NDArray[Any]:
    return np.pad(rows, ((0, 0), (0, length - rows.shape[1])))
