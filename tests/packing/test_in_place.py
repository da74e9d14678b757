"""Data sets whose images stay in the tars and files that they came in."""

import io
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import webdataset
from damage import flip_byte
from foreign_sources import write_tar
from inline_checks import check_inline
from pack_runs import build_set, faults_of, jpeg, left_out, samples_of, write_photos
from packed_sets import saved
from PIL import Image

from unicl_fast.dataset.files import LocalReader
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.images.check import CheckedImage
from unicl_fast.packing import workers
from unicl_fast.packing.build import BuildSummary

PER_TAR = 6


def turned(number: int) -> bytes:
    """An image that a decoder would turn, and so is converted."""
    image = Image.open(io.BytesIO(jpeg(number)))
    exif = image.getexif()
    exif[0x0112] = 6
    return saved(image, format="JPEG", exif=exif)


def write_shard(folder: Path, shard: int) -> Path:
    """A tar as webdataset writes it: one image of six is turned, and one is cut."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{shard:05d}.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for n in range(PER_TAR):
            number = shard * PER_TAR + n
            data = {2: turned(number), 4: jpeg(number)[:-40]}.get(n, jpeg(number))
            label = {"label": f"class {number % 3}"}
            tar.write({"__key__": f"{number:04d}", "jpg": data, "txt": f"n {n}", "json": label})
    return path


@pytest.fixture(autouse=True)
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No worker processes; grows by a word for each image that is decoded."""
    return check_here(monkeypatch)


def check_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    decoded, check = list[str](), workers.check_image

    def noted(data: bytes, **options: Any) -> CheckedImage:
        decoded.append("image")
        return check(data, **options)

    check_inline(monkeypatch)
    monkeypatch.setattr(workers, "check_image", noted)
    return decoded


def build(source: object, out: Path, **options: Any) -> BuildSummary:
    return build_set([str(source)], out, in_place=True, **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars, their index, and what packing makes of them."""
    place = tmp_path_factory.mktemp("in-place")
    for shard in range(3):
        write_shard(place / "tars", shard)
    with pytest.MonkeyPatch.context() as patched:
        check_here(patched)
        build(place / "tars", place / "index")
        build_set([str(place / "tars")], place / "packed")
    return place


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil; times are kept, and paths are written anew."""
    shutil.copytree(shared / "tars", tmp_path / "tars")
    build(tmp_path / "tars", tmp_path / "index")
    return tmp_path


def test_an_index_holds_what_packing_holds_and_no_image_but_converted_ones(shared, caplog):
    index, packed = shared / "index", shared / "packed"
    assert samples_of(index) == samples_of(packed)
    assert left_out(index) == left_out(packed)
    assert len(left_out(index)) == 3
    assert faults_of(index, decode=True) == []
    for folder, is_random in ((packed, True), (index, False)):
        PackedDataset(folder, fraction=0.5).close()
        assert ("are those of its first files" in caplog.text) != is_random
    with PackedDataset(index) as dataset:
        own = [i for i in range(len(dataset)) if dataset.sources.place_of(i) is None]
        assert len(own) == 3, "the turned ones"
        # samples of a tar follow each other in its order, so that a store is read once
        places = [one for i in range(len(dataset)) if (one := dataset.sources.place_of(i))]
        assert places == sorted(places)
        shard = (index / "shard-000000.tar").read_bytes()
        assert all(
            (dataset.image_bytes(i).tobytes() in shard) == (i in own) for i in range(len(dataset))
        )


@pytest.mark.parametrize("source", ["photos", "photos/list.csv"])
def test_files_are_indexed_and_found_from_the_data_set_if_named_so(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", range(12), ("dog", "cat"))
    names = [str(path.relative_to("photos")) for path in Path("photos").rglob("*.jpg")]
    Path("photos/list.csv").write_text("\n".join(["image,label", *map("{},x".format, names)]))
    os.utime(f"photos/{names[0]}", (-1000, -1000))  # a clock that was not set
    build(source, Path("sets/index"))
    build_set([source], Path("sets/packed"))
    # files are shuffled as samples are
    images = [set_images(Path(f"sets/{name}")) for name in ("index", "packed")]
    assert images[0] == images[1]
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos", "sets"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert set_images(tmp_path / "elsewhere/sets/index") == images[0]


def set_images(out: Path) -> list[bytes]:
    with PackedDataset(out) as dataset:
        return [dataset.image_bytes(i, verify=True).tobytes() for i in range(len(dataset))]


def test_a_changed_source_is_found_and_named(place):
    tar = place / "tars/00001.tar"
    with PackedDataset(place / "index") as dataset:
        number = next(i for i in range(len(dataset)) if dataset.shard_of(i) == str(tar))
        flip_byte(place / "index", number)
        with pytest.raises(DamagedSampleError) as caught:
            dataset.image_bytes(number, verify=True)
    words = (str(tar), "checksum", "expected", "put it back as it was", "--out NEW")
    assert all(word in str(caught.value) for word in words), caught.value
    assert [fault.kind for fault in faults_of(place / "index", decode=True)].count("source") == 1
    with tar.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"00001\.tar is not what was indexed.*it has \d+ bytes"):
        PackedDataset(place / "index")
    # training feeds others in place of a part that is gone
    tar.unlink()
    with (
        PackedDataset(place / "index", max_bad_fraction=0.5) as dataset,
        pytest.raises(DamagedSampleError, match="it is missing"),
    ):
        dataset.image_bytes(number)


def test_an_index_and_new_tars_are_a_source_of_indexes_and_of_packed_data_sets(place, looked_at):
    write_shard(place / "more", 5)
    build(place / "more", place / "second")
    expected = sorted(samples_of(place / "index") + samples_of(place / "second"))
    for name, in_place in (("merged", True), ("copied", False)):
        out = place / name
        looked_at.clear()
        build_set([str(place / "index"), str(place / "more")], out, in_place=in_place)
        if in_place:  # only the new tar
            assert len(looked_at) == PER_TAR
        assert samples_of(out) == expected
        assert faults_of(out, decode=True) == []
        assert (PackedDataset(out).sources is None) != in_place


def test_what_is_no_file_as_it_is_is_refused(place, pack):
    (place / "photos/cat").mkdir(parents=True)
    (place / "photos/cat/1.jpg").write_bytes(jpeg(1))
    zipped = shutil.make_archive(str(place / "photos"), "zip", place / "photos")
    gzipped = write_tar(place / "a.tar.gz", {"0.jpg": jpeg(0), "0.txt": b"one"})
    for arguments, words in (
        ((zipped,), "in a zip"),
        ((gzipped,), "is compressed, and images are read in place; unpack it to a .tar first"),
        (("https://user:word@host/a.tar",), "https://host/a.tar: a URL with a password"),
        ((place / "tars", "--resize", "short:16"), "--resize"),
    ):
        assert words in pack("build", "--in-place", *arguments, "--out", place / "out", code=2)


def test_sources_under_urls_are_read_where_they_lie(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url = f"file://{shared}/tars"
    for source in (url, f"{url}/{{00000..00002}}.tar"):
        out = tmp_path / f"index-{len(source)}"
        build(source, out)
        images = [sample[1:] for sample in samples_of(out)]
        assert images == [sample[1:] for sample in samples_of(shared / "index")]
        assert not any(path.suffix == ".tar" and path.name[0] == "0" for path in out.rglob("*"))
    twice = tmp_path / "twice"
    build_set([f"{url}/{{00000..00002}}.tar", f"{url}/00000.tar"], twice, in_place=True)
    with PackedDataset(twice) as dataset:
        assert len(dataset.sources) == len(list(dataset.sources._sizes())) == 4
    with PackedDataset(out) as dataset:
        assert dataset.cache is not None
        blocks = dataset.blocks_of(np.arange(len(dataset)))
        assert len(blocks) == 3
        for block in blocks:
            dataset.fetch_ahead(*block)
        with mock.patch.object(LocalReader, "read_into", side_effect=AssertionError):
            place = next(i for i in range(len(dataset)) if dataset.sources.place_of(i))
            dataset.image_bytes(place, verify=True)
        assert dataset.needed_bytes > 0
    assert faults_of(out, decode=True) == []
    # the index may lie under a URL too, if its images do
    with PackedDataset(out) as local, PackedDataset(f"file://{out}") as remote:
        assert remote.image_bytes(0).tobytes() == local.image_bytes(0).tobytes()
    with pytest.raises(ValueError, match="in files of the machine that it was made on"):
        PackedDataset(f"file://{shared}/index")
