"""Token rows of a packed data set's captions by another tokenizer than the packer's.

Captions are in the shards, so they are tokenized again once a machine (20 us of one core each, by
the tokenizer's own threads), and kept in the cache. The folder is named by a hash of tokenizer and
shards; checksums tell whether it is complete.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import (
    CAPTION_DTYPE,
    HEADER_BYTES,
    npy_header,
    open_array,
    verify_arrays,
)
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.system.atomic_files import locked, make_folder, replacing
from unicl_fast.system.checksums import (
    CHECKSUMS_NAME,
    file_checksum,
    format_checksums,
    read_checksums,
)
from unicl_fast.system.phases import mark_progress
from unicl_fast.text.tokenizer import Tokenizer

logger = logging.getLogger("unicl_fast")

LONGEST_CAPTION = 255  # most tokens that a row of captions.npy can express
_NAMES = ("captions.npy", "tokens.npy")
_SAMPLES_AT_ONCE = 2048


def take_tokens(dataset: PackedDataset, tokenizer: Tokenizer, *, cache: Path) -> None:
    """Makes a data set return another tokenizer's token rows, creating them if needed.

    One process of a machine creates them, in a folder in `cache`, while others wait. For a URL all
    shards are read, through its block cache.

    Raises:
        ValueError: its rows would be too long.
        DamagedSampleError: a caption cannot be read.
        OSError: the disk failed.
        StorageError: the store of a URL cannot be reached.
    """
    if tokenizer.context_length > LONGEST_CAPTION:
        raise ValueError(
            f"model.context_length={tokenizer.context_length}: captions have up to "
            f"{LONGEST_CAPTION} tokens"
        )
    key = f"{tokenizer.vocabulary_hash[:16]}-{tokenizer.context_length}"
    # captions are in the shards
    shards = "".join(shard.xxh3 for shard in dataset.manifest.shards).encode()
    folder = cache / f"tokens-{key}-{xxhash.xxh3_64_hexdigest(shards)}"
    if not _is_whole(folder, dataset.manifest, tokenizer):
        make_folder(folder)
        with locked(folder / "lock", wait=True):
            # by the previous holder of the lock
            if not _is_whole(folder, dataset.manifest, tokenizer):
                _make(dataset, tokenizer, folder)
    dataset.take_tokens(folder, tokenizer.token_type, vocabulary_hash=tokenizer.vocabulary_hash)


def _is_whole(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> bool:
    """Whether the rows are those of the checksums and can be used: others can write there too."""
    captions, tokens = (folder / name for name in _NAMES)
    try:
        if not (listed := read_checksums(folder)):
            return False
        open_array(captions, CAPTION_DTYPE, manifest.num_captions)
        size = (tokens.stat().st_size - HEADER_BYTES) // tokenizer.token_type.itemsize
        made = dataclasses.replace(
            manifest, num_tokens=size, context_length=tokenizer.context_length
        )
        dtypes = {"captions": CAPTION_DTYPE, "tokens": tokenizer.token_type}
        if verify_arrays(folder, made, dtypes, checksums=listed) < tokenizer.vocab_size:
            return True
    except (FileNotFoundError, ValueError):
        pass
    logger.warning("%s is damaged; its token rows are made anew", folder)
    return False


def _make(dataset: PackedDataset, tokenizer: Tokenizer, folder: Path) -> None:
    logger.info("%s: captions are tokenized again, once, into %s", dataset.location, folder)
    with dataset.whole() as whole:
        parts = list(_encoded(whole, tokenizer))
    lengths = np.concatenate([np.empty(0, np.uint8), *(lengths for lengths, _ in parts)])
    tokens = np.concatenate([np.empty(0, tokenizer.token_type), *(ids for _, ids in parts)])
    captions = np.empty(len(lengths), CAPTION_DTYPE)
    captions["tokens_length"] = lengths
    captions["tokens_start"] = np.cumsum(lengths, dtype=np.uint64) - lengths
    for name, array in zip(_NAMES, (captions, tokens), strict=True):
        with replacing(folder / name) as aside, aside.open("wb") as file:
            file.write(npy_header(array.dtype, array.shape))
            file.write(array.tobytes())
    with replacing(folder / CHECKSUMS_NAME) as aside:
        lines = format_checksums((name, file_checksum(folder / name)) for name in _NAMES)
        aside.write_text(lines, encoding="utf-8")


def _encoded(
    dataset: PackedDataset, tokenizer: Tokenizer
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]:
    """Lengths and ids of captions, in groups of samples, in order."""
    counts = dataset.samples["captions_count"].tolist()
    with contextlib.closing(SampleReader(dataset)) as reader:
        for start in range(0, len(counts), _SAMPLES_AT_ONCE):
            texts: list[str] = []
            for number, count in enumerate(counts[start : start + _SAMPLES_AT_ONCE], start):
                if count:
                    texts += reader.read_description(number).captions
            rows = tokenizer.encode(texts)
            lengths = np.array([len(row) for row in rows], np.uint8)
            yield lengths, np.concatenate([np.empty(0, tokenizer.token_type), *rows])
            mark_progress()
