"""Raw data sets (format version 2): written, read, damaged."""

import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed_sets import read_pixels, sample_of, write_set
from PIL import Image
from property_tests import examples

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import DatasetWriter, PackedSample
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum


def raw_sample(pixels: np.ndarray, number: int) -> PackedSample:
    height, width, _ = pixels.shape
    return sample_of(pixels.tobytes(), number, extension="raw", height=height, width=width)


def write(out: Path, images: np.ndarray) -> Path:
    samples = [raw_sample(pixels, number) for number, pixels in enumerate(images)]
    write_set(out, samples, shard_bytes=4000, images="raw")
    return out


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Seven images of 6 x 5 pixels; the shards hold their descriptions."""
    return write(tmp_path / "set", noise(7, 5, 6))


@given(count=st.integers(1, 9), height=st.integers(1, 12), width=st.integers(1, 12), data=st.data())
@examples(25)
def test_images_come_back_one_by_one_and_in_any_order(tmp_path_factory, count, height, width, data):
    images = noise(count, height, width)
    out = write(tmp_path_factory.mktemp("raw") / "set", images)
    assert np.array_equal(np.load(out / "pixels.npy"), images)
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=12))
    places = data.draw(st.permutations(range(len(indices) + 2)))[: len(indices)]
    with PackedDataset(out) as dataset:
        assert dataset.image_shape == (height, width, 3)
        for index, pixels in enumerate(images):
            file = io.BytesIO(dataset.image_bytes(index, verify=True).tobytes())
            assert np.array_equal(np.asarray(Image.open(file)), pixels)
        expected = np.full((len(indices) + 2, height, width, 3), 7, np.uint8)
        expected[places] = images[indices]
        found = np.full_like(expected, 7)
        sound = read_pixels(dataset, indices, found, places)
        assert sound.all()
        assert len(sound) == len(indices)
        assert np.array_equal(found, expected)


def test_the_files_are_those_of_the_format(packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["version"] == 2
    pixels = packed / "pixels.npy"
    assert manifest["pixels"] == {
        "height": 5,
        "width": 6,
        "num_bytes": 512 + 7 * 5 * 6 * 3,
        "xxh3": file_checksum(pixels),
    }
    with PackedDataset(packed) as dataset:
        assert len(dataset.manifest.shards) > 1
        assert "pixels.npy, offset 602" in dataset.describe(1)
        for row in dataset.samples:
            shard = packed / dataset.manifest.shards[int(row["shard"])].name
            member = shard.read_bytes()[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
            assert set(json.loads(member)) == {"captions", "labels", "source", "name"}


def test_images_of_another_size_are_not_written(tmp_path):
    with DatasetWriter(tmp_path / "set", images="raw") as writer:
        writer.add(raw_sample(noise(4, 5), 0))
        with pytest.raises(ValueError, match="one size, 5 x 4 .*not 4 x 5"):
            writer.add(raw_sample(noise(5, 4), 1))
    assert not list(tmp_path.iterdir())


def test_versions_have_their_own_fields(packed):
    values = json.loads((packed / "manifest.json").read_text())
    for version, pixels, message in (
        (6, values["pixels"], "version 6, this program reads versions 1 to 5"),
        (4, None, "format version 4 needs the field in_place"),
        (True, values["pixels"], "version True"),
        (1, values["pixels"], "format version 1 has no field pixels"),
        (3, values["pixels"], "format version 3 has no field pixels"),
        (2, None, "format version 2 needs the field pixels"),
        (2, values["pixels"] | {"height": -1}, "pixels.height must be .* of at least 0, not -1"),
        (2, values["pixels"] | {"depth": 1}, "pixels.depth is not a field .* known are height"),
        (2, {"height": 1}, "pixels.num_bytes is missing"),
        (2, [], "pixels must be an object"),
    ):
        changed = values | {"version": version, "pixels": pixels}
        if pixels is None:
            del changed["pixels"]
        with pytest.raises(ValueError, match=message):
            Manifest.from_json(json.dumps(changed))


def rewrite_manifest(packed: Path, **pixels: int) -> None:
    values = json.loads((packed / "manifest.json").read_text())
    values["pixels"] |= pixels
    (packed / "manifest.json").write_text(json.dumps(values))
    (packed / CHECKSUMS_NAME).unlink()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"height": 0}, "contradicts itself: 7 images of 6 x 0"),
        ({"height": 4}, "contradicts itself"),
        ({"num_bytes": 99}, "contradicts itself"),
        ({"height": 10, "width": 3}, "does not begin as an array"),
        ({"height": 2**62, "width": 2**62}, "contradicts itself"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(packed, pixels, message):
    rewrite_manifest(packed, **pixels)
    with pytest.raises(ValueError, match=message):
        PackedDataset(packed)


def test_lost_pixels_are_an_error_or_bad_samples(packed, caplog):
    path = packed / "pixels.npy"
    os.truncate(path, 512 + 5 * 90 + 1)
    with pytest.raises(ValueError, match=r"pixels\.npy has 963 bytes, the manifest says 1142"):
        PackedDataset(packed)
    with pytest.raises(ValueError, match="images of 2 of 7 samples: more than"):
        PackedDataset(packed, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING), PackedDataset(packed, max_bad_fraction=0.3) as dataset:
        assert "DAMAGED DATA SET" in caplog.text
        out = np.empty((7, 5, 6, 3), np.uint8)
        sound = read_pixels(dataset, range(7), out, range(7))
        assert sound.tolist() == [True] * 5 + [False] * 2
        with pytest.raises(ValueError, match=r"pixels\.npy ends after 1 of 90 bytes"):
            dataset.image_bytes(5)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"pixels\.npy is missing"):
        PackedDataset(packed)
    with PackedDataset(packed, max_bad_fraction=1.0) as dataset:
        assert not read_pixels(dataset, range(7), out, range(7)).any()


def test_a_shard_of_descriptions_costs_no_images(packed):
    (packed / "shard-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="shard-000000"):
        PackedDataset(packed)
    with PackedDataset(packed, max_bad_fraction=0.01) as dataset:
        dataset.image_bytes(0, verify=True)
