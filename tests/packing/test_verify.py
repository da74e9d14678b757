"""`unicl-pack verify` finds every changed byte, and says of which sample it is one."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import simplejpeg
from damage import mend_checksums
from hypothesis import given
from hypothesis import strategies as st
from pack_runs import faults_of
from packed_sets import sample_of, saved, write_set
from PIL import Image
from property_tests import examples

from unicl_fast.dataset.arrays import SAMPLE_DTYPE
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.dataset.writer import PackedSample
from unicl_fast.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=60))


def png(mode: str = "L") -> bytes:
    return saved(Image.new(mode, (24, 20), 7), format="PNG")


def sample(image: bytes, number: int, **changes: object) -> PackedSample:
    """A sample with nothing wrong but what `changes` says."""
    captions = ["A cat!", f"the number {number}"][: number % 3]
    sound = {"captions": captions, "tokens": TOKENIZER.encode(captions)}
    sound |= {"extension": "png" if image.startswith(b"\x89PNG") else "jpg"}
    return sample_of(image, number, **(sound | {"height": 20 + number, "width": 24} | changes))


def write(out: Path, samples: list[PackedSample], **options: Any) -> Path:
    facts = {"tokenizer": TOKENIZER.name, "vocabulary_hash": TOKENIZER.vocabulary_hash}
    write_set(out, samples, **({"shard_bytes": 12_000} | facts | options))
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples in several shards, with captions, labels or both."""
    samples = [sample(jpeg(number), number) for number in range(1, 9)]
    samples.append(sample(png(), 0))
    return write(tmp_path_factory.mktemp("packed") / "set", samples)


@pytest.fixture(scope="module")
def copy(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be damaged, and mended by who damages it."""
    return Path(shutil.copytree(packed, tmp_path_factory.mktemp("copy") / "set"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples of 6 x 5 pixels, in several shards; to be damaged and mended."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 6, 3), np.uint8)
    samples = [
        sample(one.tobytes(), number, height=5, width=6) for number, one in enumerate(pixels, 1)
    ]
    return write(tmp_path_factory.mktemp("raw") / "set", samples, shard_bytes=4000, images="raw")


class Damaged:
    """One byte of one file is another, for as long as this lasts."""

    def __init__(self, folder: Path, name: str, where: int, flip: int, *, mend: bool = False):
        self.path, self.mend = folder / name, mend
        files = {self.path, folder / "manifest.json", folder / "checksums.txt"}
        self.before = {path: path.read_bytes() for path in files}
        data = bytearray(self.before[self.path])
        self.place = where % len(data)
        data[self.place] ^= flip
        self.data = bytes(data)

    def __enter__(self) -> Damaged:
        self.path.write_bytes(self.data)
        if self.mend:
            mend_checksums(self.path.parent, self.path.name)
        return self

    def __exit__(self, *_: object) -> None:
        for path, data in self.before.items():
            path.write_bytes(data)


places = st.integers(0, 2**20)
flips = st.integers(1, 255)


@given(data=st.data(), where=places, flip=flips)
@examples(180)
def test_a_flipped_byte_anywhere_is_found(copy, raw, data, where, flip):
    folder = data.draw(st.sampled_from([copy, raw]))
    name = data.draw(st.sampled_from(sorted(os.listdir(folder))))
    with Damaged(folder, name, where, flip):
        found = {fault.file for fault in faults_of(folder)}
        assert found
        assert name in found or name == "checksums.txt"


@given(data=st.data(), where=places, flip=flips)
@examples(100)
def test_without_checksums_a_sample_still_contradicts_its_neighbours(copy, data, where, flip):
    """All checksums of files are right: what is left is what the samples themselves show."""
    name = data.draw(st.sampled_from(sorted(path.name for path in copy.glob("shard-*.tar"))))
    with Damaged(copy, name, where, flip, mend=True) as damaged:
        if faults_of(copy):
            return
        with PackedDataset(copy) as dataset:  # nothing but the free text of a JSON may differ
            reader = SampleReader(dataset)
            origins = {
                (description.source, description.name)
                for description in (reader.read(i).description for i in range(len(dataset)))
            }
            reader.close()
        assert len(origins - {("photos", f"{number}.jpg") for number in range(9)}) == 1
        assert damaged.path.name.endswith(".tar")


@given(data=st.data(), where=places, flip=flips)
@examples(80)
def test_arrays_contradict_the_shards(copy, data, where, flip):
    """Also where somebody has changed an array and made new checksums."""
    name = data.draw(st.sampled_from(["samples", "captions", "tokens", "labels"])) + ".npy"
    with Damaged(copy, name, where, flip, mend=True) as damaged:
        try:
            differs = np.load(copy / name).tolist() != np.load(io.BytesIO(
                damaged.before[damaged.path])).tolist()  # fmt: skip
        except Exception:
            differs = True
        if name == "samples.npy" and damaged.place >= 512:
            column = (damaged.place - 512) % SAMPLE_DTYPE.itemsize
            differs &= not 16 <= column < 20  # height and width take decoding
        assert bool(faults_of(copy)) >= differs


def test_files_that_are_missing_added_or_cut_are_named(packed, copy):
    for name in sorted(os.listdir(packed)):
        whole = (copy / name).read_bytes()
        (copy / name).unlink()
        assert {fault.file for fault in faults_of(copy)} == {name}
        (copy / name).write_bytes(whole[:-7])
        assert name in {fault.file for fault in faults_of(copy)}
        (copy / name).write_bytes(whole)
    (copy / "photo.jpg").write_bytes(b"")
    (copy / "folder").mkdir()
    assert [(fault.file, fault.kind) for fault in faults_of(copy)] == [
        *(("folder", "extra"), ("photo.jpg", "extra"))
    ]
    (copy / "photo.jpg").unlink()
    (copy / "folder").rmdir()
    assert not faults_of(copy)


@pytest.mark.parametrize("change", [lambda text: text[:-7], lambda text: "?" + text[1:]])
def test_a_damaged_list_of_checksums_is_one_fault_and_none_of_what_it_lists(copy, change):
    with Damaged(copy, "checksums.txt", 0, 0):
        (copy / "checksums.txt").write_text(change((copy / "checksums.txt").read_text()))
        assert [(fault.file, fault.kind) for fault in faults_of(copy)] == [
            ("checksums.txt", "checksum")
        ]


def test_lies_with_good_checksums_are_found_in_their_samples(tmp_path):
    others = psutil.Process().children()  # which fixtures of a session have started
    sound = jpeg(2)
    cut = sound[:-50] + b"\xff\xd9"
    tokens = TOKENIZER.encode(["A cat!", "the number 9"])
    lies = {
        1: sample(cut, 2),
        2: sample(b"<html>not found</html>", 2),
        3: sample(sound, 2, width=25),
        4: sample(png(mode="RGBA"), 2, height=20),
        5: sample(sound, 2, tokens=tokens),
        6: sample(sound, 2, xxh3=1),
        7: sample(sound, 2, captions=["\ud800", "b"], tokens=tokens),
        8: sample(sound, 2, extension="webp"),
    }
    out = write(tmp_path / "set", [sample(sound, 2), *lies.values(), sample(sound, 2)])
    found = {fault.sample: (fault.kind, fault.message) for fault in faults_of(out, decode=True)}
    assert set(found) == set(lies)
    kinds = {number: kind for number, (kind, _) in found.items()}
    expected = {**dict.fromkeys((1, 2, 3, 4, 8), "image"), 5: "tokens", 6: "checksum", 7: "tokens"}
    assert kinds == expected
    assert "libjpeg" in found[1][1]
    assert "22 x 24 pixels, samples.npy says 22 x 25" in found[3][1]
    assert "would have encoded it again" in found[4][1]
    assert found[8][1] == "its bytes are those of a .jpg, not of a .webp"
    assert set(psutil.Process().children()) <= set(others)
    quick = {fault.sample for fault in faults_of(out)}
    assert quick == {5, 6, 7}


def test_pixels_that_are_missing_or_cut_are_named(raw, caplog, pack):
    path = raw / "pixels.npy"
    whole = path.read_bytes()
    path.unlink()
    assert [(fault.file, fault.kind) for fault in faults_of(raw)] == [("pixels.npy", "missing")]
    for num_bytes, num_whole in ((512 + 7 * 90 + 1, 7), (100, 0)):
        path.write_bytes(whole[:num_bytes])
        found = faults_of(raw)
        assert {fault.file for fault in found} == {"pixels.npy"}
        assert [fault.kind for fault in found][:2] == ["checksum", "array"]
        assert [fault.sample for fault in found][2:] == list(range(num_whole, 9))
    assert not caplog.records
    pack("verify", raw, code=1)
    assert not caplog.records  # of what training would feed instead
    # which whoever opens it afterwards in this process is told all the same
    PackedDataset(raw, max_bad_fraction=1.0).close()
    assert "DAMAGED DATA SET" in caplog.text
    path.write_bytes(whole)
    assert not faults_of(raw)


def test_a_damaged_shard_of_a_raw_set_leaves_its_images_compared(raw):
    with Damaged(raw, "shard-000000.tar", 3, 1), Damaged(raw, "pixels.npy", 512, 1, mend=True):
        found = {(fault.file, fault.kind) for fault in faults_of(raw) if fault.sample == 0}
    assert found == {("shard-000000.tar", "shard"), ("pixels.npy", "checksum")}


def test_a_manifest_that_contradicts_itself_about_pixels_is_one_fault(raw):
    path = raw / "manifest.json"
    with Damaged(raw, "manifest.json", 0, 0):
        values = json.loads(path.read_text())
        values["pixels"]["height"] += 1
        path.write_text(json.dumps(values))
        mend_checksums(raw, "manifest.json")
        messages = [fault.message for fault in faults_of(raw) if fault.kind == "manifest"]
    assert len(messages) == 1
    assert "9 images of 6 x 6 pixels" in messages[0]


def test_the_program_prints_some_and_lists_all(packed, copy, tmp_path, pack):
    text = pack("verify", packed, "--no-decode")
    assert f"{packed}: sound; 9 images (0 decoded), 9 captions" in text
    words = "--show", 1, "--list", tmp_path / "all.csv"
    with Damaged(copy, "samples.npy", 520, 255), Damaged(copy, "shard-000000.tar", 600, 1):
        text = pack("verify", copy, "--no-decode", *words, code=1)
    rows = list(csv.DictReader((tmp_path / "all.csv").open(newline="")))
    assert len(rows) > 2
    assert {"samples.npy", "shard-000000.tar"} <= {row["file"] for row in rows}
    assert f"and {len(rows) - 1} more, listed in {tmp_path / 'all.csv'}" in text
    assert "FAULTS FOUND" in text
