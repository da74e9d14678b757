"""Past DALI, raw data sets and small images: its batches, and its substitutes of bad ones."""

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import copy_of, flip_byte, store, undecodable
from loader_runs import (
    BATCH,
    assert_joined,
    assert_same,
    config_of,
    count_replaced,
    prompts_of,
    remembering,
    rows_of,
    take,
)
from packed_sets import Sample, pack, saved
from PIL import Image

from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset, TooManyBadSamplesError
from unicl_fast.images.codec import decode_files
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.pipelines.evaluation_loader import EvaluationLoader
from unicl_fast.pipelines.read.samples import read_images
from unicl_fast.pipelines.running import DecodingError
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.dali

HEIGHT, WIDTH, SIZE = 24, 30, 32
STEPS = 10  # more than a pass over both data sets
LABELLED, CAPTIONED = 0, 1
NAMES = ["cat", "dog", "yak"]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels if seed % 5 else pixels[..., 0]), format="PNG")


Sets = dict[str, list[PackedDataset]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Sets]:
    """The same samples twice: as PNGs and raw; labelled ones and captioned ones of one size."""
    folder = tmp_path_factory.mktemp("packed")
    labelled = [Sample(png(i), labels=[i % 3]) for i in range(40)]
    captioned = [Sample(png(100 + i), captions=[f"image {i}", "a thing"]) for i in range(30)]
    found: Sets = {
        form: [
            pack(folder / f"{form} {name}", samples, class_names=names, tokenizer=tokenizer,
                 format="raw" if form == "raw" else "keep")
            for name, samples, names in (
                ("labelled", labelled, NAMES), ("captioned", captioned, ())
            )
        ]
        for form in ("png", "raw")
    }  # fmt: skip
    yield found
    for dataset in itertools.chain(*found.values()):
        dataset.close()


@pytest.fixture
def sound(sets: Sets) -> list[PackedDataset]:
    return sets["raw"]


@pytest.fixture(scope="module")
def prompts(sets: Sets, tokenizer: Tokenizer) -> ClassPrompts:
    return prompts_of(sets["png"], tokenizer)


def make_loader(
    datasets: Sequence[PackedDataset], prompts: ClassPrompts, *, batch: int = BATCH, **more: Any
) -> TrainLoader:
    data = {key: more.pop(key) for key in ("resample", "interpolation", "augment") if key in more}
    return TrainLoader(config_of(batch=batch, **data), datasets, None, prompts, **more)


@pytest.mark.parametrize("form", ["png", "raw"])
def test_a_loader_tells_how_long_storage_kept_it_waiting(sets, prompts, form, monkeypatch):
    loader = make_loader(sets[form], prompts)
    assert loader.reading.decodes_files == (form == "png")
    read = PackedDataset.read_images

    def read_slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.01)
        return read(*arguments, **options)

    monkeypatch.setattr(PackedDataset, "read_images", read_slowly)
    next(loader.host.batches(0))
    assert loader.reading.blocked_seconds >= 0.01


def test_raw_images_are_decoded_beside_small_jpegs(sets, tokenizer, tmp_path):
    """Then they need their headers, as files have them."""
    jpegs = [Sample(saved(Image.open(io.BytesIO(png(i))), format="JPEG"), labels=[i % 3])
             for i in range(20)]  # fmt: skip
    batches = []
    with pack(tmp_path / "jpegs", jpegs, class_names=NAMES, tokenizer=tokenizer) as small:
        for kind, form in (("raw", "crops"), ("png", "files")):
            mixed = [sets[kind][LABELLED], small]
            loader = make_loader(mixed, prompts_of(mixed, tokenizer))
            assert loader.form == form
            batches.append(take(loader, count=STEPS))
    assert_same(*batches)


def test_images_of_a_batch_are_read_as_single_ones_are(sets):
    datasets = [sets["png"][0], sets["raw"][0]]
    sources = np.array([1, 0, 0, 1, 0], np.int32)
    samples = np.array([3, 7, 3, 0, 1])
    images, sound = read_images(datasets, sources, samples, max_pixels=0)
    files = [
        datasets[source].image_bytes(sample)
        for source, sample in zip(sources.tolist(), samples.tolist(), strict=True)
    ]
    assert sound.all()
    assert all(map(np.array_equal, images.files(), files))
    other = images.replaced(np.array([1, 4]), [files[0], files[3]])
    expected = [files[0], files[0], files[2], files[3], files[3]]
    assert all(map(np.array_equal, other.files(), expected))


@pytest.mark.parametrize(
    ("resample", "augment"), [("fused", "none"), ("fused", "unicl"), ("dali", "none")]
)
def test_raw_images_give_the_batches_of_files(sets, prompts, resample, augment):
    settings = {"resample": resample, "augment": (augment,)}
    raw = make_loader(sets["raw"], prompts, **settings)
    assert raw.form == {"fused": "crops", "dali": "pixels"}[resample]
    batches = take(raw, count=STEPS)
    assert_same(batches, take(make_loader(sets["png"], prompts, **settings), count=STEPS))
    assert batches[0].images.dtype == torch.uint8
    assert tuple(batches[0].images.shape) == (BATCH, SIZE, SIZE, 3)


@pytest.mark.parametrize("batch", [1, 5, 70])
def test_any_batch_size_and_number_of_threads_gives_the_same_images(
    sets, prompts, batch, monkeypatch
):
    """A group of batches is one, or many; crops are split among threads, or not."""
    few = take(make_loader(sets["raw"], prompts, batch=batch), count=6)
    monkeypatch.setattr("unicl_fast.pipelines.crops._CROPPED_AT_ONCE", 1)
    monkeypatch.setattr("unicl_fast.pipelines.steps._PLANNED_AT_ONCE", 1)
    assert_same(few, take(make_loader(sets["raw"], prompts, batch=batch), count=6))


def test_batches_handed_out_stay_what_they_were(sets, prompts):
    loader = make_loader(sets["raw"], prompts)
    held, copies = [], []
    for batch in itertools.islice(loader.batches(0), 200):
        held.append(batch.images)
        copies.append(batch.images.clone())
    loader.close()
    assert all(map(torch.equal, held, copies))


# From here on: damage.


ROW = HEIGHT * WIDTH * 3


def flip_pixel(folder: Path, sample: int) -> None:
    with (folder / "pixels.npy").open("r+b") as file:
        file.seek(512 + sample * ROW + ROW // 2)
        (old,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 1]))


def test_damaged_rows_are_named_replaced_and_nothing_else_changes(
    sets, folders, spoilt, prompts, tmp_path
):
    expected = take(make_loader(sets["raw"], prompts), count=STEPS)
    bad = {(LABELLED, 7), (LABELLED, 39), (CAPTIONED, 0)}
    for source, sample in bad:
        flip_pixel(folders[source], sample)
    path = tmp_path / "quarantine.csv"
    batches = take(make_loader(spoilt(), prompts, quarantine=path), count=STEPS)
    assert count_replaced(batches, expected, bad) >= len(bad)
    # what is fed instead is a function of the step, and the same through the decoder and DALI
    again = make_loader(spoilt(), prompts)
    assert_same(batches[3:], take(again, start=3, count=STEPS - 3))
    assert_same(batches, take(remembering(again, bad), count=STEPS))
    mixed = make_loader([spoilt()[LABELLED], sets["png"][CAPTIONED]], prompts)
    assert mixed.form == "files"
    assert_same(batches, take(remembering(mixed, {(CAPTIONED, 0)}), count=STEPS))
    rows = {(row["data_set"], int(row["key"])): row for row in rows_of(path)}
    assert set(rows) == {(str(folders[source]), sample) for source, sample in bad}
    for (_, sample), row in rows.items():
        assert (row["shard"], int(row["offset"])) == ("pixels.npy", 512 + sample * ROW)
        assert "checksum" in row["reason"]


@pytest.mark.parametrize("kind", ["cut", "gone"])
def test_pixels_that_vanish_under_a_run_are_replaced(
    sets, folders, spoilt, prompts, kind,
    monkeypatch,
):  # fmt: skip
    # few batches are read at once, else all could have been read before the damage is done
    monkeypatch.setattr("unicl_fast.pipelines.crops._CROPPED_AT_ONCE", 4 * BATCH)
    count = 400
    whole = make_loader(sets["raw"], prompts)
    expected = take(whole, count=count)
    assert whole.reading.num_threads == 2
    datasets = spoilt()
    loader = make_loader(datasets, prompts)
    running = loader.batches(0)
    batches = [next(running)]
    path = folders[CAPTIONED] / "pixels.npy"
    if kind == "cut":
        os.truncate(path, 512 + 12 * ROW + 5)
        bad = {(CAPTIONED, sample) for sample in range(12, 30)}
    else:
        flip_pixel(folders[CAPTIONED], 4)
        path.unlink()  # those who have it open read on
        bad = {(CAPTIONED, 4)}
    batches += itertools.islice(running, count - 1)
    loader.close()
    # by then some groups of batches had been read
    assert count_replaced(batches[-20:], expected[-20:], bad) >= 20 * BATCH / 70 / 2
    if kind == "gone":
        with PackedDataset(folders[CAPTIONED], max_bad_fraction=1.0) as later:
            with pytest.raises(DamagedSampleError, match=r"pixels\.npy cannot be read: .*No such"):
                later.image_bytes(3)
            alone = make_loader([datasets[LABELLED], later], prompts)
            with pytest.raises(TooManyBadSamplesError, match="100 others"):
                next(alone.batches(0))
            alone.close()


def test_a_graph_that_fails_is_no_image_s_fault(sets, prompts, tmp_path):
    loader = make_loader(
        sets["raw"], prompts, resample="dali", quarantine=tmp_path / "quarantine.csv"
    )
    plan_of = loader.plan.long_batch

    def beyond(*args: Any, **options: Any) -> Any:
        planned = plan_of(*args, **options)
        planned.windows[:, 2:4] = HEIGHT + 9
        return planned

    loader.plan.long_batch = beyond
    with pytest.raises(DecodingError, match="step 0, rank 0: the graph fails"):
        next(loader.batches(0))
    loader.close()
    assert not (tmp_path / "quarantine.csv").exists()


def test_evaluation_shows_the_pixels_of_files_and_names_damage(sets, folders, spoilt):
    data = config_of().data
    expected, shown = (
        next(iter(EvaluationLoader(sets[form][0], data, batch_size=64))) for form in ("png", "raw")
    )
    assert torch.equal(shown.images, expected.images)
    flip_pixel(folders[LABELLED], 3)
    with pytest.raises(DamagedSampleError, match=r"sample 0000000003 .*pixels\.npy.*checksum"):
        list(EvaluationLoader(spoilt()[LABELLED], data, batch_size=5))


# Small images of files, which are decoded without DALI.

SAVED: tuple[dict[str, Any], ...] = (
    {"format": "JPEG", "quality": 75},
    {"format": "JPEG", "quality": 90, "subsampling": 0, "progressive": True},
    {"format": "PNG"},
    {"format": "JPEG", "quality": 80, "subsampling": 1, "restart_marker_blocks": 4},
    {"format": "WEBP", "quality": 80},
    {"format": "PPM"},
)


def file_of(number: int) -> bytes:
    """A small photograph-like image of a format, every seventh of them grey."""
    draw = np.random.default_rng(number)
    height, width = draw.integers(5, 130, 2).tolist()
    coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    options = SAVED[number % len(SAVED)]
    grey = number % 7 == 3 and options["format"] != "WEBP"
    return saved(image.convert("L") if grey else image, **options)


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> Iterator[PackedDataset]:
    samples = [Sample(file_of(i), labels=[i % 3]) for i in range(70)]
    options: Any = {"class_names": NAMES, "tokenizer": tokenizer, "format": "packed"}
    with pack(tmp_path_factory.mktemp("small") / "set", samples, **options) as dataset:
        yield dataset


@pytest.fixture
def small_loader(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> Callable[..., TrainLoader]:
    """A loader by DALI, or without it."""

    def make(dataset: PackedDataset, form: str, **more: Any) -> TrainLoader:
        are_small = "unicl_fast.pipelines.train_loader.are_small_jpegs"
        monkeypatch.setattr(are_small, lambda *_: form == "crops")
        loader = make_loader([dataset], prompts_of([dataset], tokenizer), batch=16, **more)
        assert loader.form == form
        assert loader.reading.decodes_files
        return loader

    return make


@pytest.mark.parametrize(
    ("format", "side", "form"),
    [("JPEG", 60, "crops"), ("PNG", 60, "files"), ("JPEG", 200, "files"), ("PPM", 200, "crops")],
)
def test_only_small_jpegs_and_ppms_go_past_dali(tmp_path, tokenizer, format, side, form):
    file = saved(Image.new("RGB", (side, side), "teal"), format=format)
    samples = [Sample(file, labels=[i % 2]) for i in range(8)]
    options: Any = {"class_names": ["cat", "dog"], "tokenizer": tokenizer, "format": "packed"}
    with pack(tmp_path / "set", samples, **options) as dataset:
        assert make_loader([dataset], prompts_of([dataset], tokenizer), batch=4).form == form


@pytest.mark.parametrize(
    "more",
    [{}, {"interpolation": "bicubic"}, {"augment": ("unicl",)}],
    ids=["plain", "bicubic", "unicl"],
)
def test_batches_are_those_of_dali(small, small_loader, more):
    by_dali = take(small_loader(small, "files", **more), count=8)
    assert_same(take(small_loader(small, "crops", **more), count=8), by_dali)
    for step in (3, 5):
        assert_same(
            take(small_loader(small, "crops", **more), start=step, count=1), [by_dali[step]]
        )
    parts = [
        take(small_loader(small, "crops", rank=rank, world_size=2, **more), count=8)
        for rank in range(2)
    ]
    for step, expected in enumerate(by_dali):
        assert_joined([part[step] for part in parts], expected)


@pytest.mark.parametrize("group", [2048, 8], ids=["groups", "large"])
def test_bad_ones_are_replaced_as_by_dali(
    small, small_loader, tmp_path,
    monkeypatch, group,
):  # fmt: skip
    """In groups of batches, and in a batch that threads share."""
    monkeypatch.setattr("unicl_fast.pipelines.crops._CROPPED_AT_ONCE", group)
    expected = take(small_loader(small, "files"), count=8)
    folder = copy_of(small, tmp_path / "set")
    sizes = small.samples["size"].astype(np.int64)
    large = np.argsort(-sizes)[:6].tolist()
    flip_byte(folder, large[0])
    for sample, kind in zip(large[1:4], ("html", "gif", "cut png"), strict=True):
        store(folder, sample, undecodable(kind))
    file = saved(Image.new("RGB", (7, 9)), format="JPEG", quality=10)
    if len(file) <= sizes[large[4]]:
        store(folder, large[4], file)  # sound, and of another size
    else:
        flip_byte(folder, large[4])
    with PackedDataset(folder, max_bad_fraction=1.0) as spoilt:
        found = {
            form: take(small_loader(spoilt, form, quarantine=tmp_path / f"{form}.csv"), count=8)
            for form in ("files", "crops")
        }
    assert_same(found["crops"], found["files"])
    assert count_replaced(found["crops"], expected, {(0, sample) for sample in large[:5]}) >= 1
    listed = [{row["key"] for row in rows_of(tmp_path / f"{form}.csv")} for form in found]
    assert listed[0] == listed[1]
    assert len(listed[0]) == 5


@pytest.mark.parametrize(
    "file", [b"", b"\xff", b"\xff\xd8\xff", b"GIF89a", b"P6\n9 9\n255\n", bytes(99)]
)
def test_bytes_that_are_no_image_are_named_and_the_others_decoded(file):
    sound = file_of(2)
    with Image.open(io.BytesIO(sound)) as image:
        pixels = np.asarray(image.convert("RGB"))
    files = [np.frombuffer(one, np.uint8) for one in (file, sound)]
    shapes = np.array([[9, 9], pixels.shape[:2]], np.int64)
    content = np.zeros(3 * 9 * 9 + pixels.size, np.uint8)
    faults = decode_files(content, EncodedImages.of(files), shapes, 0, 2)
    assert faults.keys() == {0}
    assert faults[0]
    assert "object at" not in faults[0]  # another one in each run
    assert np.array_equal(content[3 * 9 * 9 :].reshape(pixels.shape), pixels)
