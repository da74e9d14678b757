"""The packed format: what is written is what is read, by us and by others."""

import copy
import dataclasses
import errno
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed_sets import FACTS, read_pixels, sample_of, saved, write_raw_set, write_set
from PIL import Image
from property_tests import examples

from unicl_fast.dataset import writer as shard_writer
from unicl_fast.dataset.block_cache import Ranges
from unicl_fast.dataset.files import LocalReader
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import DamagedDatasetError, DamagedSampleError, PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.dataset.writer import DatasetWriter, PackedSample
from unicl_fast.system.checksums import file_checksum


def jpeg(number: int) -> bytes:
    return saved(Image.new("RGB", (20 + number, 16), (number * 20, 90, 10)), format="JPEG")


def sample(number: int, **changes: Any) -> PackedSample:
    image = changes.pop("image", jpeg(number))
    return sample_of(image, number, **({"labels": list(range(2 - number % 2))} | changes))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    samples = [sample(number) for number in range(9)]
    write_set(tmp_path / "set", samples, shard_bytes=8_000, class_names=["cat", "Käse"])
    return tmp_path / "set"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Seven images of 6 x 5 pixels; the shards hold their descriptions."""
    return write_raw_set(tmp_path / "raw", noise(7, 5, 6))


def test_a_webp_makes_it_another_version_also_if_an_earlier_writer_put_it_there(tmp_path):
    """A stand-in for WebP: the writer goes by the name."""
    samples = [sample(number, extension="webp" if number == 1 else "jpg") for number in range(9)]
    assert write_set(tmp_path / "jpg", [sample(0)]).version == 1
    assert write_set(tmp_path / "webp", samples).version == 3
    work = tmp_path / "work"
    work.mkdir()
    with DatasetWriter(tmp_path / "set", shard_bytes=8_000, work=work) as writer:
        for one in samples[:7]:
            writer.add(one)
    with DatasetWriter(tmp_path / "set", shard_bytes=8_000, work=work) as writer:
        assert 1 < writer.num_samples < 7
        for one in samples[writer.num_samples :]:
            writer.add(one)
        assert writer.finish(**FACTS).version == 3
    PackedDataset(tmp_path / "set").close()


@given(st.lists(st.text(), max_size=3), st.lists(st.integers(0, 2**31 - 1), max_size=3), st.text())
def test_a_description_is_what_a_json_encoder_makes(captions, labels, name):
    odd = f'"{name}"\\\udcff\n'
    told = sample(0, captions=[*captions, odd], tokens=[], labels=labels, source=odd, name=name)
    fields = {"captions": [*captions, odd], "labels": labels, "source": odd, "name": name}
    expected = json.dumps(fields, separators=(",", ":")).encode("ascii")
    assert shard_writer._describe(told) == expected


MANY_CLASSES = [str(number) for number in range(70_000)]
token_rows = st.lists(st.integers(0, 65535), min_size=2, max_size=77)


@given(
    samples=st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=1500),
            st.lists(token_rows, max_size=3),
            st.lists(st.integers(0, 69_999), max_size=3),
        ).filter(lambda sample: sample[1] or sample[2]),
        min_size=1,
        max_size=8,
    ),
    shard_bytes=st.integers(1, 6000),
)
@examples(30)
def test_any_samples_survive_the_round_trip(tmp_path_factory, samples, shard_bytes):
    out = tmp_path_factory.mktemp("round") / "set"
    tokens = [[np.array(row, np.uint16) for row in rows] for _, rows, _ in samples]
    written = [
        sample(0, image=image, captions=["text"] * len(rows), tokens=rows, labels=labels)
        for (image, _, labels), rows in zip(samples, tokens, strict=True)
    ]
    write_set(out, written, shard_bytes=shard_bytes, class_names=MANY_CLASSES)
    with PackedDataset(out) as dataset:
        for number, (image, rows, labels) in enumerate(samples):
            assert dataset.image_bytes(number, verify=True).tobytes() == image
            assert dataset.samples[number][["height", "width"]].tolist() == (16, 20)
            assert dataset.samples[number]["captions_count"] == len(rows)
            for which, row in enumerate(rows):
                assert dataset.caption_tokens(number, which).tolist() == row
            assert dataset.labels_of(number).tolist() == labels
        for info in dataset.manifest.shards:
            assert info.num_bytes <= shard_bytes or info.num_samples == 1


def test_webdataset_reads_the_shards(packed):
    import webdataset

    shards = [str(path) for path in sorted(packed.glob("*.tar"))]
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [one["__key__"] for one in read] == [f"{number:010d}" for number in range(9)]
    assert [one["jpg"].shape for one in read] == [(16, 20 + number, 3) for number in range(9)]
    assert [one["json"]["labels"] for one in read] == [sample(n).labels for n in range(9)]


@pytest.mark.dali
def test_indexes_equal_those_of_dalis_own_tool(packed, tmp_path):
    import wds2idx

    for shard in packed.glob("*.tar"):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "i.idx"), verbose=False) as creator:
            creator.create_index()
        assert shard.with_suffix(".idx").read_bytes() == (tmp_path / "i.idx").read_bytes()


@given(count=st.integers(1, 9), height=st.integers(1, 12), width=st.integers(1, 12), data=st.data())
@examples(25)
def test_raw_images_come_back_one_by_one_and_in_any_order(
    tmp_path_factory, count, height, width, data
):
    images = noise(count, height, width)
    out = write_raw_set(tmp_path_factory.mktemp("raw") / "set", images)
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


def test_the_files_of_a_raw_set_are_those_of_its_format(raw):
    manifest = json.loads((raw / "manifest.json").read_text())
    assert manifest["version"] == 2
    pixels = raw / "pixels.npy"
    assert manifest["pixels"] == {
        "height": 5,
        "width": 6,
        "num_bytes": 512 + 7 * 5 * 6 * 3,
        "xxh3": file_checksum(pixels),
    }
    with PackedDataset(raw) as dataset:
        assert len(dataset.manifest.shards) > 1
        assert "pixels.npy, offset 602" in dataset.describe(1)
        for row in dataset.samples:
            shard = raw / dataset.manifest.shards[int(row["shard"])].name
            member = shard.read_bytes()[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
            assert set(json.loads(member)) == {"captions", "labels", "source", "name"}


def test_raw_images_of_another_size_are_not_written(tmp_path):
    with DatasetWriter(tmp_path / "set", images="raw") as writer:
        writer.add(sample(0, extension="raw", image=bytes(60), height=4, width=5))
        with pytest.raises(ValueError, match="one size, 5 x 4 .*not 4 x 5"):
            writer.add(sample(1, extension="raw", image=bytes(60), height=5, width=4))
    assert not list(tmp_path.iterdir())


def test_manifests_of_other_versions_and_fields_are_refused_by_name(raw):
    values = json.loads((raw / "manifest.json").read_text())
    pixels = values["pixels"]
    for change, message in (
        ({"version": 6}, "version 6, this program reads versions 1 to 5"),
        ({"version": 4, "pixels": None}, "format version 4 needs the field in_place"),
        ({"version": True}, "version True"),
        ({"version": 1}, "format version 1 has no field pixels"),
        ({"version": 3}, "format version 3 has no field pixels"),
        ({"pixels": None}, "format version 2 needs the field pixels"),
        ({"pixels": pixels | {"height": -1}}, "pixels.height must be .* of at least 0, not -1"),
        ({"pixels": pixels | {"depth": 1}}, "pixels.depth is not a field .* known are height"),
        ({"pixels": {"height": 1}}, "pixels.num_bytes is missing"),
        ({"pixels": []}, "pixels must be an object"),
        ({"pixels": pixels | {"xxh3": "../../ab"}}, "must be 16 hexadecimal .* not '../../ab'"),
        ({"shards": [values["shards"][0] | {"xxh3": f"{0:016}\n"}]}, "xxh3 must be 16 hexadecimal"),
        ({"num_samples": "9"}, "num_samples"),
        ({"shards": [3]}, "shards"),
        ({"class_names": [1]}, "class_names"),
        ({"unknown": 1}, "unknown"),
    ):
        changed = {key: value for key, value in (values | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            Manifest.from_json(json.dumps(changed))


def test_a_manifest_of_another_number_of_samples_is_refused(packed):
    path = packed / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_samples": 8}))
    with pytest.raises(ValueError, match="8"):
        PackedDataset(packed)


@pytest.mark.parametrize("name", ["samples.npy", "labels.npy", "tokens.npy", "shard-000001.tar"])
def test_missing_and_cut_files_are_named(packed, name):
    os.truncate(packed / name, 300)
    with pytest.raises(ValueError, match=name):
        PackedDataset(packed)
    (packed / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        PackedDataset(packed)


def test_damaged_shards_are_tolerated_up_to_a_part_and_said_aloud(packed, caplog):
    shards = Manifest.load(packed).shards
    (packed / shards[0].name).unlink()
    os.truncate(packed / shards[1].name, 1000)
    num_bad = shards[0].num_samples + shards[1].num_samples
    for tolerated in (0.0, (num_bad - 0.5) / 9):
        with pytest.raises(FileNotFoundError, match=f"{shards[0].name} is missing"):
            PackedDataset(packed, max_bad_fraction=tolerated)
    with pytest.raises(FileNotFoundError, match=f"2 such .*of {num_bad} of 9.*0.01 allows"):
        PackedDataset(packed, max_bad_fraction=0.01)
    assert not caplog.records
    with PackedDataset(packed, max_bad_fraction=num_bad / 9) as dataset:
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"of {num_bad} of 9 samples" in record.message
        for number in range(9):
            if number < num_bad:
                with pytest.raises(
                    DamagedSampleError, match=f"{number:010d} .*{shards[0].name}|ends"
                ):
                    dataset.image_bytes(number)
            else:
                assert dataset.image_bytes(number, verify=True).tobytes() == jpeg(number)


def test_a_shard_that_cannot_be_read_is_an_error_with_the_sample_s_name(packed, monkeypatch):
    def fail_with(number: int) -> None:
        def preadv(*_: Any) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("os.preadv", preadv)

    with PackedDataset(packed) as dataset:
        dataset.image_bytes(3)
        for number in (errno.EIO, errno.ESTALE):
            fail_with(number)
            with pytest.raises(DamagedSampleError, match=f"0000000003 .*{os.strerror(number)}"):
                dataset.image_bytes(3)
        fail_with(errno.ENOMEM)  # not the shard's fault
        with pytest.raises(OSError, match="memory"):
            dataset.image_bytes(3)


def test_a_file_that_the_file_system_has_forgotten_is_opened_anew(packed, monkeypatch):
    with PackedDataset(packed) as dataset:
        dataset.image_bytes(0)
        (stale,) = dataset._reader._files.values()
        preadv = os.preadv

        def forgetful(file: int, *arguments: Any) -> int:
            if file == stale:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return preadv(file, *arguments)

        monkeypatch.setattr("os.preadv", forgetful)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert dataset.image_bytes(0, verify=True).tobytes() == jpeg(0)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["samples", "captions", "tokens", "labels"])
def test_arrays_that_are_replaced_stay_what_they_were_and_cut_ones_are_told(packed, name):
    path = packed / f"{name}.npy"
    with PackedDataset(packed) as dataset:
        before, content = np.array(getattr(dataset, name)), path.read_bytes()
        (packed / "other").write_bytes(b"short")
        (packed / "other").rename(path)
        dataset.check_arrays()
        assert np.array_equal(getattr(dataset, name), before)
    path.write_bytes(content)
    with PackedDataset(packed) as dataset:
        os.truncate(path, 300)
        with pytest.raises(DamagedDatasetError, match=rf"{name}\.npy was cut .* 300 bytes"):
            dataset.check_arrays()


def test_numbers_out_of_range_are_refused(packed):
    with PackedDataset(packed) as dataset:
        for index in (-1, 9):
            with pytest.raises(IndexError, match="0 to 8"):
                dataset.image_bytes(index)
        with pytest.raises(IndexError, match="2 captions"):
            dataset.caption_tokens(2, 2)


def test_files_that_are_not_kept_open_are_opened_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr("unicl_fast.dataset.files._MAX_OPEN_FILES", 1)
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere é"
    folder.mkdir()
    elsewhere.write_bytes(b"..elsewhere")
    names = ["kept", "a", "../folder/b", str(elsewhere), "pipe", "gone", "short", "."]
    for name in ("kept", "a", "b", "short"):
        (folder / name).write_bytes(b".." + name.encode())
    os.mkfifo(folder / "pipe")
    reader = LocalReader(folder, names.__getitem__)
    before = len(os.listdir("/proc/self/fd"))
    numbers, buffer = np.arange(len(names)), np.zeros(80, np.uint8)
    sizes = np.array([4, 1, 1, 9, 1, 1, 6, 1])
    whole = reader.read_ranges(Ranges(numbers, np.full(8, 2), sizes, 10 * numbers), buffer)
    assert whole.tolist() == [True] * 4 + [False] * 4
    found = [buffer[10 * i :][: sizes[i]].tobytes() for i in range(4)]
    assert found == [b"kept", b"a", b"b", b"elsewhere"]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    with pytest.raises(ValueError, match="has been closed"):
        reader.read_ranges(Ranges(*[numbers] * 4), buffer)


def test_folders_and_samples_that_cannot_be_used_are_refused(packed, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"it holds some; name {packed}"):
        PackedDataset(tmp_path)
    with pytest.raises(ValueError, match="already holds a packed data set"):
        DatasetWriter(packed)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        DatasetWriter(tmp_path / "other")
    assert (tmp_path / "other" / "letter.txt").exists()
    with pytest.raises(FileNotFoundError, match="unicl-pack build"):
        PackedDataset(tmp_path / "other")
    with DatasetWriter(tmp_path / "new") as writer, pytest.raises(ValueError, match="or labels"):
        writer.add(dataclasses.replace(sample(0), captions=[], tokens=[], labels=[]))


def test_a_part_of_a_data_set_is_its_first_samples(tmp_path):
    write_set(tmp_path / "set", [sample(number) for number in range(5)])
    whole = PackedDataset(tmp_path / "set")
    for fraction, used in ((1.0, 5), (0.5, 2), (0.7, 4), (0.001, 1)):
        with PackedDataset(tmp_path / "set", fraction=fraction) as part:
            assert len(part) == len(part.samples) == used
            assert np.array_equal(part.samples, whole.samples[:used])
            assert bytes(part.image_bytes(used - 1)) == bytes(whole.image_bytes(used - 1))
            with pytest.raises(IndexError, match=f"samples 0 to {used - 1}"):
                part.image_bytes(used)
    os.truncate(tmp_path / "set" / "samples.npy", 600)
    with pytest.raises(DamagedDatasetError, match="samples.npy was cut"):
        part.check_arrays()
    whole.close()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_files_of_its_own(packed, copied):
    with PackedDataset(packed, fraction=0.5) as dataset:
        samples = SampleReader(dataset)
        before, shown = dataset.image_bytes(3), samples.read(3)
        for _ in range(2):
            one, other = copied(dataset), copied(samples)
            assert (len(one), one.largest_token) == (len(dataset), dataset.largest_token)
            assert np.array_equal(one.image_bytes(3, verify=True), before)
            assert other.read(3).description == shown.description
            one.close()
            other.close()
        assert np.array_equal(dataset.image_bytes(3, verify=True), before)
        assert samples.read(3).description == shown.description
        samples.close()
    with pytest.raises(ValueError, match="has been closed"):
        dataset.image_bytes(3)
