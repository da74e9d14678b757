"""Damages a packed data set in every way and looks what comes: run as a program, in a process.

    python fuzz_datasets.py FOLDER EXAMPLES

FOLDER holds the data set; it is damaged in place, file by file, and mended again. A crash of the
interpreter ends this process with a signal, which the test that started it sees.
"""

import json
import sys
from pathlib import Path
from typing import Any

from children import run_python
from damaged_files import damaged_bytes, damaged_json, damaged_npy, fuzz_files
from hypothesis import strategies as st

from unicl_fast.dataset.arrays import ARRAY_DTYPES
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.system.checksums import CHECKSUMS_NAME

NOT_READ = (".idx", ".csv")
"""Files that our reader leaves alone: damage there changes nothing for it."""


def read_all(folder: Path) -> list[Any]:
    """Every image, caption and label, and what the manifest says of them."""
    found: list[Any] = []
    with PackedDataset(folder) as dataset:
        manifest = dataset.manifest
        found.append((manifest.class_names, manifest.templates, manifest.vocabulary_hash))
        for index in range(len(dataset)):
            row = dataset.samples[index]
            found.append(
                (
                    dataset.image_bytes(index, verify=True).tobytes(),
                    (int(row["height"]), int(row["width"])),
                    [
                        dataset.caption_tokens(index, which).tolist()
                        for which in range(int(row["captions_count"]))
                    ],
                    dataset.labels_of(index).tolist(),
                )
            )
    return found


def is_clear(path: Path, error: Exception) -> bool:
    """Our own words: not an error of a library passed on, and it says where."""
    ours = type(error) in (ValueError, FileNotFoundError, DamagedSampleError)
    return ours and str(path.parent) in str(error) and path.suffix not in NOT_READ


def fuzz(folder: Path, examples: int) -> dict[str, int]:
    """Runs this program, in whose process a crash is a failure; how many cases ended how."""
    counts: dict[str, int] = json.loads(run_python(__file__, folder, examples))
    return counts


def main(folder: Path, examples: int) -> None:
    expected = read_all(folder)
    images = {sample[0] for sample in expected[1:]}

    def damaged(path: Path, content: bytes) -> st.SearchStrategy[bytes]:
        if dtype := ARRAY_DTYPES.get(path.name.removesuffix(".npy")):
            return damaged_npy(content, dtype)
        structured = [damaged_json(content)] if path.suffix == ".json" else []
        return st.one_of(damaged_bytes(content), *structured)

    def attempt(path: Path, with_checksums: bool, _: bool) -> str:
        if not with_checksums:
            (folder / CHECKSUMS_NAME).unlink()
        found = read_all(folder)
        if with_checksums or path.suffix in NOT_READ:
            assert found == expected
            return "same"
        # nothing is there to tell by; but every image is one that was packed
        assert {sample[0] for sample in found[1:]} <= images
        return "consistent"

    originals = {path: path.read_bytes() for path in folder.iterdir()}
    fuzz_files(originals, damaged, attempt, is_clear, examples=examples)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
