"""CIFAR's files and IDX files: pixels in rows."""

from __future__ import annotations

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
from PIL import Image

from unicl_fast.packing.limited_processes import run_limited
from unicl_fast.packing.sources import arrays
from unicl_fast.packing.sources.arrays import PickledArray, read_pickle
from unicl_fast.packing.sources.items import Item, ListOptions, Problem, Span
from unicl_fast.packing.sources.read_sources import read_source
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


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads pickles without a process of its own, which takes half a second to start."""
    monkeypatch.setattr(arrays, "run_limited", lambda function, tasks, **_: map(function, tasks))


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


@pytest.mark.usefixtures("in_this_process")
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


@pytest.mark.usefixtures("in_this_process")
def test_archives_are_read_as_they_are_downloaded(tmp_path: Path) -> None:
    batches = [pixels(25, seed=seed) for seed in range(2)]
    files = {f"cifar-10-batches-py/{name}": data for name, data in cifar10(*batches).items()}
    data = write_tar(tmp_path / "x", files).read_bytes()
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(gzip.compress(data))
    with Spool(tmp_path / "spool") as spool:
        train = read_source(str(archive), spool=spool)
        test = read_source(str(archive / "test_batch"), spool=spool)
        assert np.array_equal(np.stack([decoded(item) for item in train.items]), batches[0])
        assert np.array_equal(np.stack([decoded(item) for item in test.items]), batches[1])
        with pytest.raises(FileNotFoundError, match=r"no data_batch_9; it has .*test_batch"):
            read_source(str(archive / "data_batch_9"), spool=spool)
        archive.write_bytes(archive.read_bytes()[:-100_000])
        with pytest.raises(ValueError, match="cifar-10-python.tar.gz is damaged.*fetch it again"):
            read_source(str(archive), spool=spool)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


def span_of(path: Path) -> Span:
    return Span(str(path), 0, path.stat().st_size)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.usefixtures("in_this_process")
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    trap = pickle.dumps({"data": Trap(tmp_path / "sprung")}, protocol)
    folder = write_files(tmp_path / "cifar", cifar10(pixels(23), pixels(23)))
    (folder / "data_batch_1").write_bytes(trap)
    found = read_pickle(span_of(folder / "data_batch_1"))
    assert isinstance(found, Problem)
    assert re.search(r"asks for .*(getattr|touch|Path)", found.message)
    assert outcomes(read_source(str(folder))) == {"data_batch_1 from row 0": "damaged"}
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)  # the trap works
    assert (tmp_path / "sprung").exists()


def crafted(*parts: bytes) -> bytes:
    """A pickle of protocol 4 that no pickler writes."""
    return b"\x80\x04" + b"".join(parts) + b"."


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def hash_bomb() -> bytes:
    """As a key, a pair of the same pair of the same pair ...: its hash takes 2**60 steps."""
    deeper = b"".join(b"2\x86" for _ in range(60))
    return crafted(b"}", b"K\x01", deeper, b"K\x02s")


def array_bomb() -> bytes:
    """An array of 10**13 bytes."""
    size = b"\x8a\x06" + (10**13).to_bytes(6, "little")
    return crafted(name("numpy", "ndarray"), size, b"\x85R")


def memo_bomb() -> bytes:
    """A place in the memo for which all those before it are made."""
    return crafted(b"K\x01r\xff\xff\xff\x7f")


def test_bombs_are_refused_and_the_others_are_read(tmp_path: Path) -> None:
    """In one process after another, as in a build."""
    good = cifar10(pixels(23), pixels(23))["data_batch_1"]
    data = [hash_bomb(), array_bomb(), memo_bomb(), good]
    for number, content in enumerate(data):
        (tmp_path / f"{number}").write_bytes(content)
    tasks = [span_of(tmp_path / f"{number}") for number in range(len(data))]
    slow, *large, fine = run_limited(read_pickle, tasks, memory_bytes=500_000_000, seconds=0.5)
    assert isinstance(slow, Problem)
    assert slow.kind == "too slow"
    assert [problem.kind for problem in large if isinstance(problem, Problem)] == ["too large"] * 2
    assert isinstance(fine, dict)


@pytest.mark.parametrize(
    "asked",
    ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "codecs.encode", "nt.x"],
)
def test_only_what_arrays_need_is_known(tmp_path: Path, asked: str) -> None:
    module, attribute = asked.split(".")
    (tmp_path / "x").write_bytes(crafted(name(module, attribute)))
    found = read_pickle(span_of(tmp_path / "x"))
    assert isinstance(found, Problem)
    assert found.message == f"the pickle asks for {asked!r}" + (
        "; only arrays of numpy are read, and nothing else is called"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": np.zeros((30, 3072), np.uint8)}, "no list of 30 labels"),
        ({"data": np.zeros((30, 3071), np.uint8), "labels": [0] * 30}, "shape .30, 3071."),
        ({"data": np.zeros((3072, 30), np.uint8).T, "labels": [0] * 30}, "column by column"),
        ({"data": np.zeros((30, 3072), np.float32), "labels": [0] * 30}, "f4 of shape"),
        ({"data": np.zeros((1, 3072), object), "labels": [0]}, "no array called"),
        ({"data": [1, 2], "labels": [0, 0]}, "no array called"),
        ([1], "no dict"),
        ({1: 2, "x": {1, 2}}, "no array called"),
    ],
)
@pytest.mark.usefixtures("in_this_process")
def test_pickles_of_other_things_say_what_is_missing(
    tmp_path: Path, fields: Any, message: str
) -> None:
    folder = write_files(tmp_path / "cifar", cifar10(pixels(23), pixels(23)))
    (folder / "data_batch_1").write_bytes(pickle.dumps(fields, 4))
    (item,) = read_source(str(folder)).items
    assert item.problem is not None
    assert re.search(message, item.problem.message)


@pytest.mark.usefixtures("in_this_process")
def test_labels_that_are_no_numbers_cost_their_rows(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "cifar", cifar10(pixels(23), pixels(23)))
    labels = [True, "cat", None, [1], 9, 1]
    fields = {"data": planes(pixels(6)), "labels": labels}
    (folder / "data_batch_1").write_bytes(pickle.dumps(fields, 4))
    source = read_source(str(folder))
    assert list(outcomes(source).values()) == ["bad row"] * 5 + ["read"]
    assert np.array_equal(decoded(source.items[5]), pixels(6)[5])


def test_any_damage_to_a_pickle_is_refused_or_harmless(tmp_path: Path) -> None:
    """Some of it ends the process: a length of gigabytes does."""
    generator = np.random.default_rng(0)
    good = cifar10(pixels(22), pixels(1))["data_batch_1"]
    for number in range(200):
        content = bytearray(good)
        for _ in range(generator.integers(1, 5)):
            # where instructions are, not in the pixels
            at = generator.choice([*range(250), *range(len(good) - 150, len(good))])
            content[at] = generator.integers(256)
        if number % 4 == 0:
            del content[generator.integers(200, len(good)) :]
        if number % 10 == 0:
            content = bytearray(b"\x80\x04" + generator.bytes(300))
        (tmp_path / f"{number:03d}").write_bytes(content)
    tasks = [span_of(path) for path in sorted(tmp_path.iterdir())]
    results = list(run_limited(read_pickle, tasks, memory_bytes=300_000_000, seconds=5))
    assert len(results) == len(tasks)
    for task, found in zip(tasks, results, strict=True):
        array = found.get("data") if isinstance(found, dict) else None
        if isinstance(array, PickledArray) and array.offset >= 0:
            assert array.offset + np.prod(array.shape) <= task.num_bytes
    assert any(isinstance(found, Problem) for found in results)
    assert any(isinstance(found, dict) for found in results)


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
    with Spool(tmp_path / "spool") as spool:
        source = read_source(str(tmp_path / name), spool=spool)
        assert np.array_equal(np.stack([decoded(item) for item in source.items]), images)
        assert [item.labels for item in source.items] == [[number] for number in range(7)]
        with pytest.raises(ValueError, match="holds labels"):
            read_source(str(tmp_path / beside), spool=spool)
        (tmp_path / beside).unlink()
        with pytest.raises(FileNotFoundError, match="labels"):
            read_source(str(tmp_path / name), spool=spool)


@pytest.mark.parametrize("cut", ["images-idx3.gz", "labels-idx1.gz"])
def test_an_idx_file_whose_checksum_is_cut_off_is_named_and_keeps_its_rows(
    tmp_path: Path, cut: str
) -> None:
    (tmp_path / "images-idx3.gz").write_bytes(gzip.compress(idx(pixels(3)[..., 0])))
    (tmp_path / "labels-idx1.gz").write_bytes(gzip.compress(idx(np.arange(3, dtype=np.uint8))))
    (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-6])
    with Spool(tmp_path / "spool") as spool:
        source = read_source(str(tmp_path / "images-idx3.gz"), spool=spool)
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
