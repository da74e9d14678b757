"""CIFAR's files and IDX files: pixels in rows."""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from foreign_sources import outcomes, planes, python2_pickle, read, texts, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unicl_fast.packing.sources.pickled_arrays import (
    LongString,
    PickledArray,
    PickleRefusedError,
    read_pickle,
)
from unicl_fast.packing.sources.read_sources import Item, ListOptions, read_source
from unicl_fast.packing.sources.spool import Spool

NAMES = ["airplane", "cat", "ship"]


def pixels(count: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def decoded(item: Item) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(read(item))))


def cifar10(*batches: npt.NDArray[np.uint8]) -> dict[str, bytes]:
    """The Python version, as Python 2 wrote it."""
    meta = {"num_cases_per_batch": 10000, "label_names": NAMES, "num_vis": 3072}
    files = {"batches.meta": python2_pickle(meta), "readme.html": b"<html>"}
    for number, batch in enumerate(batches, start=1):
        name = f"data_batch_{number}" if number < len(batches) else "test_batch"
        rows = {
            "batch_label": f"batch {number}",
            "labels": [row % 3 for row in range(len(batch))],
            "data": planes(batch),
            "filenames": [f"{row}.png" for row in range(len(batch))],
        }
        files[name] = python2_pickle(rows)
    return files


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_the_python_version_gives_its_training_images_bit_for_bit(tmp_path: Path) -> None:
    batches = [pixels(40, seed=seed) for seed in range(3)]
    folder = write_files(tmp_path / "cifar-10-batches-py", cifar10(*batches))
    source = read_source(str(folder))
    assert source.passed_over == {"files of test images": 1}
    assert source.labels_are_names
    assert [item.name for item in source.items[:2]] == ["data_batch_1:0", "data_batch_1:1"]
    assert [item.labels for item in source.items[:4]] == [[name] for name in [*NAMES, NAMES[0]]]
    found = np.stack([decoded(item) for item in source.items])
    assert np.array_equal(found, np.concatenate(batches[:2]))
    test = read_source(str(folder / "test_batch"))
    assert np.array_equal(np.stack([decoded(item) for item in test.items]), batches[2])


def test_a_real_batch_goes_through_pickles_of_all_protocols(
    shared_data: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip") as archive:
        names = archive.namelist()[::400]
        images = [Image.open(io.BytesIO(archive.read(name))) for name in names]
    batch = np.stack([np.asarray(image) for image in images])
    fields = {b"labels": [0] * len(batch), b"data": planes(batch)}
    for protocol in (3, 4, 5):
        folder = tmp_path / str(protocol)
        write_files(folder, {"data_batch_1": pickle.dumps(fields, protocol)})
        meta: dict[str, Any] = {"label_names": NAMES}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
        source = read_source(str(folder))
        assert np.array_equal(np.stack([decoded(item) for item in source.items]), batch)


def test_the_binary_version_and_both_labels_of_cifar_100(tmp_path: Path) -> None:
    batch = pixels(5)
    records = [bytes([n % 2, n]) + planes(batch)[n].tobytes() for n in range(5)]
    folder = write_files(
        tmp_path / "cifar-100-binary",
        {
            "train.bin": b"".join(records) + b"rest",
            "test.bin": records[4],
            "fine_label_names.txt": b"apple\nbaby\nbear\nbed\n",
            "coarse_label_names.txt": b"fish\nflowers\n",
        },
    )
    source = read_source(str(folder))
    assert texts(source)["train.bin:3"] == ([], ["bed"])
    assert outcomes(source) == {
        **{f"train.bin:{n}": "read" for n in range(4)},
        **{"train.bin:4": "bad row", "train.bin from row 5": "damaged"},  # label 4 has no name
    }
    assert np.array_equal(decoded(source.items[2]), batch[2])
    coarse = read_source(str(folder), ListOptions(label_column="coarse_labels"))
    assert texts(coarse)["train.bin:4"] == ([], ["fish"])
    with pytest.raises(ValueError, match="coarse_labels, not 'x'"):
        read_source(str(folder), ListOptions(label_column="x"))


def test_archives_are_read_as_they_are_downloaded(tmp_path: Path) -> None:
    batches = [pixels(25, seed=seed) for seed in range(2)]
    files = {f"cifar-10-batches-py/{name}": data for name, data in cifar10(*batches).items()}
    data = write_tar(tmp_path / "x", files).read_bytes()
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(gzip.compress(data))
    with Spool(tmp_path / "out") as spool:
        train = read_source(str(archive), None, spool)
        test = read_source(str(archive / "test_batch"), None, spool)
        assert np.array_equal(np.stack([decoded(item) for item in train.items]), batches[0])
        assert np.array_equal(np.stack([decoded(item) for item in test.items]), batches[1])
        with pytest.raises(FileNotFoundError, match=r"no data_batch_9; it has .*test_batch"):
            read_source(str(archive / "data_batch_9"), None, spool)
        archive.write_bytes(archive.read_bytes()[:-100_000])
        with pytest.raises(ValueError, match="cifar-10-python.tar.gz is damaged.*fetch it again"):
            read_source(str(archive), None, spool)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


def unpickled(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data), 0, len(data))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    trap = pickle.dumps({"data": Trap(tmp_path / "sprung")}, protocol)
    with pytest.raises(PickleRefusedError, match=r"asks for .*(getattr|touch|Path)"):
        unpickled(trap)
    folder = write_files(tmp_path / "cifar", cifar10(pixels(23), pixels(23)))
    (folder / "data_batch_1").write_bytes(trap)
    assert outcomes(read_source(str(folder))) == {"data_batch_1 from row 0": "damaged"}
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)  # the trap works
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": np.zeros((30, 3072), np.uint8)}, "no list of 30 labels"),
        ({"data": np.zeros((30, 3071), np.uint8), "labels": [0] * 30}, "shape .30, 3071."),
        ({"data": np.zeros((3072, 30), np.uint8).T, "labels": [0] * 30}, "column by column"),
        ({"data": np.zeros((30, 3072), np.float32), "labels": [0] * 30}, "f4 of shape"),
        ({"data": [1, 2], "labels": [0, 0]}, "no array called"),
        ([1], "no dict"),
        ({1: 2}, "a key that is no text"),
        ({"x": {1, 2}}, "instruction"),
    ],
)
def test_pickles_of_other_things_say_what_is_missing(
    tmp_path: Path, fields: Any, message: str
) -> None:
    folder = write_files(tmp_path / "cifar", cifar10(pixels(23), pixels(23)))
    (folder / "data_batch_1").write_bytes(pickle.dumps(fields, 4))
    (item,) = read_source(str(folder)).items
    assert item.problem is not None
    assert re.search(message, item.problem.message)


@given(data=st.data())
@settings(max_examples=200)
def test_any_damage_to_a_pickle_is_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(cifar10(pixels(22), pixels(1))["data_batch_1"])
    for _ in range(data.draw(st.integers(1, 4))):
        # where instructions are, not in the pixels
        place = data.draw(st.integers(0, 250) | st.integers(len(content) - 150, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        found = unpickled(bytes(content[: data.draw(st.integers(200, len(content)))]))
    except PickleRefusedError:
        return
    array = found.get("data") if isinstance(found, dict) else None
    if isinstance(array, PickledArray) and isinstance(array.data, LongString):
        assert array.data.offset + array.data.length <= len(content)


@given(data=st.binary(max_size=300))
@settings(max_examples=200)
def test_no_bytes_make_the_pickle_reader_fail_otherwise(data: bytes) -> None:
    with contextlib.suppress(PickleRefusedError):
        unpickled(b"\x80\x04" + data)


def idx(images: npt.NDArray[np.uint8]) -> bytes:
    shape = b"".join(size.to_bytes(4, "big") for size in images.shape)
    return b"\0\0\x08" + bytes([images.ndim]) + shape + images.tobytes()


@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte", "t10k-images.idx3-ubyte", "x-images-idx3-ubyte.gz"]
)
def test_idx_files_are_read_with_the_labels_beside_them(tmp_path: Path, name: str) -> None:
    images = pixels(7)[:, :20, :28, 0]
    labels = np.arange(7, dtype=np.uint8)
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(idx(images)))
    beside = name.replace("images", "labels").replace("idx3", "idx1")
    (tmp_path / beside).write_bytes(pack(idx(labels)))
    with Spool(tmp_path / "out") as spool:
        source = read_source(str(tmp_path / name), None, spool)
        assert np.array_equal(np.stack([decoded(item) for item in source.items]), images)
        assert [item.labels for item in source.items] == [[number] for number in range(7)]
        with pytest.raises(ValueError, match="holds labels"):
            read_source(str(tmp_path / beside), None, spool)
        (tmp_path / beside).unlink()
        with pytest.raises(FileNotFoundError, match="labels"):
            read_source(str(tmp_path / name), None, spool)


@pytest.mark.parametrize("cut", ["images-idx3.gz", "labels-idx1.gz"])
def test_an_idx_file_whose_checksum_is_cut_off_is_named_and_keeps_its_rows(
    tmp_path: Path, cut: str
) -> None:
    (tmp_path / "images-idx3.gz").write_bytes(gzip.compress(idx(pixels(3)[..., 0])))
    (tmp_path / "labels-idx1.gz").write_bytes(gzip.compress(idx(np.arange(3, dtype=np.uint8))))
    (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-6])
    with Spool(tmp_path / "out") as spool:
        source = read_source(str(tmp_path / "images-idx3.gz"), None, spool)
        assert outcomes(source) == {
            **{f"images-idx3.gz:{row}": "read" for row in range(3)},
            "images-idx3.gz from row 3": "damaged",
        }
    problem = source.items[-1].problem
    assert problem is not None
    assert problem.message == f"{cut}: it ends in the middle of its gzip data"


def test_idx_files_that_lie_or_are_cut(tmp_path: Path) -> None:
    rows, labels = pixels(5)[..., 0], np.zeros(5, np.uint8)
    images, beside = tmp_path / "images-idx3", tmp_path / "labels-idx1"
    beside.write_bytes(idx(labels))
    images.write_bytes(idx(rows)[:-1500])
    source = read_source(str(images))
    assert outcomes(source) == {
        **{f"images-idx3:{row}": "read" for row in range(3)},
        "images-idx3 from row 3": "damaged",
    }
    beside.write_bytes(idx(labels)[:-4])
    assert list(outcomes(read_source(str(images)))) == ["images-idx3:0", "images-idx3 from row 1"]
    beside.write_bytes(idx(labels[:4]))
    with pytest.raises(ValueError, match="4 labels for 5 images"):
        read_source(str(images))
    for shape in (b"\xff" * 12, bytes(12), b"\0\0\0\5" + b"\xff" * 8):
        images.write_bytes(b"\0\0\x08\x03" + shape)
        with pytest.raises(ValueError, match=r"declares [\d,]+ images of"):
            read_source(str(images))
    images.write_bytes(b"\0\0\x08\x03" + b"\xff\xff\xff\xff" + b"\0\0\0\1" * 2 + b"12")
    beside.write_bytes(b"\0\0\x08\x01" + b"\xff\xff\xff\xff" + b"123")
    assert len(read_source(str(images)).items) == 3
    images.write_bytes(idx(pixels(2)))
    with pytest.raises(ValueError, match="no IDX file of grey images"):
        read_source(str(images))
