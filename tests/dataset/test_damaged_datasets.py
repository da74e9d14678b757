"""A damaged data set is an error that says so: no other exception, no crash, no wrong sample."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import fuzz_datasets
import numpy as np
import pytest
from damage import mend_checksums
from hypothesis import given
from hypothesis import strategies as st
from packed_sets import read_pixels, sample_of, write_raw_set, write_set
from property_tests import examples

from unicl_fast.dataset.arrays import ARRAY_DTYPES, blocks_of, open_array
from unicl_fast.dataset.growing_files import ArrayFile
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.checksums import CHECKSUMS_NAME


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Seven samples in three shards, with captions, labels or both."""
    images = [bytes([number]) * (500 + number) for number in range(7)]
    samples = [sample_of(image, number) for number, image in enumerate(images)]
    write_set(tmp_path / "set", samples, shard_bytes=9000)
    return tmp_path / "set"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Seven images of 6 x 5 pixels; the shards hold their descriptions."""
    images = np.arange(7, dtype=np.uint8).repeat(90).reshape(7, 5, 6, 3)
    return write_raw_set(tmp_path / "raw", images)


@pytest.mark.parametrize("kind", ["packed", "raw"])
@pytest.mark.parametrize(
    "examples",
    [40, pytest.param(150, marks=pytest.mark.slow), pytest.param(5_000, marks=pytest.mark.long)],
)
def test_any_damage_is_a_clear_error_or_changes_nothing(request, kind, examples):
    counts = fuzz_datasets.fuzz(request.getfixturevalue(kind), examples)
    # each way out has been tried
    assert set(counts) == {"refused", "same", "consistent"}
    assert min(counts.values()) > examples // 40, counts


def test_every_flipped_bit_of_a_manifest_is_found(packed):
    """Class names have no meaning of their own that could give them away."""
    original = (packed / "manifest.json").read_bytes()
    for place in range(0, len(original), len(original) // 50):
        data = bytearray(original)
        data[place] ^= 1 << place % 8
        (packed / "manifest.json").write_bytes(data)
        with pytest.raises(ValueError, match=str(packed)):
            PackedDataset(packed)


def rewrite(packed: Path, name: str, change: Any) -> None:
    """Changes rows of an array and its checksum with it, as somebody with intentions would."""
    path = packed / f"{name}.npy"
    content = path.read_bytes()
    rows = np.frombuffer(content[512:], ARRAY_DTYPES[name]).copy()
    change(rows)
    path.write_bytes(content[:512] + rows.tobytes())
    mend_checksums(packed, path.name)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("samples", "shard", 3, "row 4 names a shard that does not exist"),
        ("samples", "offset", 10**6, "beyond the end of its shard"),
        ("samples", "offset", 2**64 - 100, "beyond the end of its shard"),
        ("samples", "size", 2**32 - 1, "beyond the end of its shard"),
        ("samples", "size", 0, "no bytes"),
        ("samples", "height", 0, "no pixels"),
        ("samples", "captions_start", 2**64 - 1, "captions that do not exist"),
        ("samples", "captions_count", 65_535, "captions that do not exist"),
        ("samples", ["captions_count", "labels_count"], 0, "row 4 has neither captions nor labels"),
        ("samples", "labels_start", 6, "labels that do not exist"),
        ("captions", "tokens_start", 2**64 - 2, "tokens that do not exist"),
        ("captions", "tokens_start", 25, "tokens that do not exist"),
        ("captions", "tokens_length", 0, "no tokens"),
        ("captions", "tokens_length", 78, "more than 77"),
        ("labels", "", 2, "not one of the 2 classes"),
        ("labels", "", -1, "not one of the 2 classes"),
    ],
)
def test_references_to_what_is_not_there_are_refused_whatever_the_checksums_say(
    packed, name, field, value, message
):
    def change(rows: Any) -> None:
        for one in [field] if isinstance(field, str) else field:
            (rows[one] if one else rows)[4] = value

    rewrite(packed, name, change)
    with pytest.raises(ValueError, match=message):
        PackedDataset(packed)


def test_a_sample_of_another_size_than_the_raw_data_set_s_is_refused(raw):
    rewrite(raw, "samples", lambda rows: rows["width"].__setitem__(3, 7))
    with pytest.raises(ValueError, match="row 3 is an image of another size"):
        PackedDataset(raw)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"height": 0}, "contradicts itself: 7 images of 6 x 0"),
        ({"height": 4}, "contradicts itself"),
        ({"height": 10, "width": 3}, "does not begin as an array"),
        ({"height": 2**62, "width": 2**62}, "contradicts itself"),
    ],
)
def test_sizes_of_pixels_that_contradict_each_other_are_refused(raw, pixels, message):
    values = json.loads((raw / "manifest.json").read_text())
    values["pixels"] |= pixels
    (raw / "manifest.json").write_text(json.dumps(values))
    (raw / CHECKSUMS_NAME).unlink()
    with pytest.raises(ValueError, match=message):
        PackedDataset(raw)


def test_lost_pixels_are_an_error_or_bad_samples(raw, caplog):
    path = raw / "pixels.npy"
    os.truncate(path, 512 + 5 * 90 + 1)
    with pytest.raises(ValueError, match=r"pixels\.npy has 963 bytes, the manifest says 1142"):
        PackedDataset(raw)
    with pytest.raises(ValueError, match="images of 2 of 7 samples: more than"):
        PackedDataset(raw, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING), PackedDataset(raw, max_bad_fraction=0.3) as dataset:
        assert "DAMAGED DATA SET" in caplog.text
        out = np.empty((7, 5, 6, 3), np.uint8)
        sound = read_pixels(dataset, range(7), out, range(7))
        assert sound.tolist() == [True] * 5 + [False] * 2
        with pytest.raises(ValueError, match=r"pixels\.npy ends after 1 of 90 bytes"):
            dataset.image_bytes(5)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"pixels\.npy is missing"):
        PackedDataset(raw)
    with PackedDataset(raw, max_bad_fraction=1.0) as dataset:
        assert not read_pixels(dataset, range(7), out, range(7)).any()


def test_a_shard_of_descriptions_costs_no_images(raw):
    (raw / "shard-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="shard-000000"):
        PackedDataset(raw)
    with PackedDataset(raw, max_bad_fraction=0.01) as dataset:
        dataset.image_bytes(0, verify=True)


@given(length=st.integers(0, 50), data=st.data())
@examples(40)
def test_arrays_of_any_length_are_opened_and_checked_block_by_block(tmp_path_factory, length, data):
    folder = tmp_path_factory.mktemp("array")
    file = ArrayFile(folder, "labels", dtype=ARRAY_DTYPES["labels"])
    values = np.arange(length, dtype="<i4")
    file.append(values.tobytes())
    file.finish()
    assert np.array_equal(open_array(folder / "labels.npy", ARRAY_DTYPES["labels"], length), values)
    for wrong in (length + 1, 0 if length else 5):
        with pytest.raises(ValueError, match=f"as an array of {wrong} rows"):
            open_array(folder / "labels.npy", ARRAY_DTYPES["labels"], wrong)
    with (folder / "labels.npy").open("ab") as longer:
        longer.write(b"x")
    with pytest.raises(ValueError, match=r"labels\.npy is damaged .* bytes where"):
        open_array(folder / "labels.npy", ARRAY_DTYPES["labels"], length)


def resident_bytes(path: Path) -> int:
    """Of a mapped file, pages that are counted as this process's memory."""
    mine, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mine = line.endswith(str(path))
        elif mine and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux tells what is there")
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_pages_read_for_a_look_at_all_samples_are_given_back(packed, fraction):
    with PackedDataset(packed, fraction=fraction) as dataset:
        for rows in blocks_of(dataset.samples):
            assert int(rows["size"].sum()) > 0
            assert resident_bytes(packed / "samples.npy") > 0
        assert resident_bytes(packed / "samples.npy") == 0
