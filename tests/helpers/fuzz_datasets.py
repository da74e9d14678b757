"""Damages a packed data set in every way and looks what comes: run as a program, in a process.

    python fuzz_datasets.py FOLDER EXAMPLES

FOLDER holds the data set; it is damaged in place, file by file, and mended again. A crash of the
interpreter ends this process with a signal, which the test that started it sees.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from damaged_files import damaged_bytes, damaged_json, damaged_npy, run_fuzzer, thorough
from hypothesis import given
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


def is_clear(error: Exception, folder: Path) -> bool:
    """Our own words: not an error of a library passed on, and it says where."""
    ours = type(error) in (ValueError, FileNotFoundError, DamagedSampleError)
    return ours and str(folder) in str(error)


fuzz = functools.partial(run_fuzzer, __file__)


def main(folder: Path, examples: int) -> None:
    originals = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = read_all(folder)
    images = {sample[0] for sample in expected[1:]}
    counts = {"refused": 0, "same": 0, "consistent": 0}

    @st.composite
    def damage(draw: st.DrawFn) -> tuple[str, bytes, bool]:
        name = draw(st.sampled_from(sorted(originals)))
        content = originals[name]
        if name.removesuffix(".npy") in ARRAY_DTYPES:
            data = draw(damaged_npy(content, ARRAY_DTYPES[name.removesuffix(".npy")]))
        elif name.endswith(".json") and draw(st.booleans()):
            data = draw(damaged_json(content))
        else:
            data = draw(damaged_bytes(content))
        return name, data, draw(st.booleans())

    @given(case=damage())
    @thorough(examples)
    def check(case: tuple[str, bytes, bool]) -> None:
        name, data, with_checksums = case
        (folder / name).write_bytes(data)
        if not with_checksums:
            (folder / CHECKSUMS_NAME).unlink()
        try:
            found = read_all(folder)
        except Exception as error:
            assert is_clear(error, folder), f"{type(error).__name__}: {error}"  # noqa: PT017
            assert not name.endswith(NOT_READ)
            counts["refused"] += 1
        else:
            if with_checksums or name.endswith(NOT_READ):
                assert found == expected
                counts["same"] += 1
            else:  # nothing is there to tell by; but every image is one that was packed
                assert {sample[0] for sample in found[1:]} <= images
                counts["consistent"] += 1
        finally:
            for changed in {name, CHECKSUMS_NAME}:
                (folder / changed).write_bytes(originals[changed])

    check()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
