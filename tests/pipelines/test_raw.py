"""Raw data sets past the decoder: the same batches as of the same images in files."""

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import copy_of
from loader_runs import (
    BATCH,
    assert_same,
    config_of,
    count_replaced,
    prompts_of,
    rows_of,
    take,
)
from packed_sets import Sample, pack, saved
from PIL import Image

from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset, TooManyBadSamplesError
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
                ("labelled", labelled, ["cat", "dog", "yak"]), ("captioned", captioned, ())
            )
        ]
        for form in ("png", "raw")
    }  # fmt: skip
    yield found
    for dataset in itertools.chain(*found.values()):
        dataset.close()


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
    names, batches = ["cat", "dog", "yak"], []
    with pack(tmp_path / "jpegs", jpegs, class_names=names, tokenizer=tokenizer) as small:
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


@pytest.fixture
def folders(sets: Sets, tmp_path: Path) -> list[Path]:
    """Copies to be spoilt."""
    return [copy_of(dataset, tmp_path / dataset.folder.name) for dataset in sets["raw"]]


@pytest.fixture
def opened(folders: list[Path], opening: Any) -> Callable[[], list[PackedDataset]]:
    """Opens the copies, once they are spoilt."""
    return partial(opening, folders)


ROW = HEIGHT * WIDTH * 3


def flip_pixel(folder: Path, sample: int) -> None:
    with (folder / "pixels.npy").open("r+b") as file:
        file.seek(512 + sample * ROW + ROW // 2)
        (old,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 1]))


def test_damaged_rows_are_named_replaced_and_nothing_else_changes(
    sets, folders, opened, prompts, tmp_path
):
    expected = take(make_loader(sets["raw"], prompts), count=STEPS)
    bad = {(LABELLED, 7), (LABELLED, 39), (CAPTIONED, 0)}
    for source, sample in bad:
        flip_pixel(folders[source], sample)
    path = tmp_path / "quarantine.csv"
    batches = take(make_loader(opened(), prompts, quarantine=path), count=STEPS)
    assert count_replaced(batches, expected, bad) >= len(bad)
    # what is fed instead is a function of the step, and the same through the decoder and DALI
    again = make_loader(opened(), prompts)
    assert_same(batches[3:], take(again, start=3, count=STEPS - 3))
    for source, sample in bad:
        again.steps.bad.mark(source, sample, "found by the test")
    assert_same(batches, take(again, count=STEPS))
    mixed = make_loader([opened()[LABELLED], sets["png"][CAPTIONED]], prompts)
    assert mixed.form == "files"
    mixed.steps.bad.mark(CAPTIONED, 0, "found by the test")
    assert_same(batches, take(mixed, count=STEPS))
    rows = {(row["data_set"], int(row["key"])): row for row in rows_of(path)}
    assert set(rows) == {(str(folders[source]), sample) for source, sample in bad}
    for (_, sample), row in rows.items():
        assert (row["shard"], int(row["offset"])) == ("pixels.npy", 512 + sample * ROW)
        assert "checksum" in row["reason"]


@pytest.mark.parametrize("kind", ["cut", "gone"])
def test_pixels_that_vanish_under_a_run_are_replaced(
    sets, folders, opened, prompts, kind,
    monkeypatch,
):  # fmt: skip
    # few batches are read at once, else all could have been read before the damage is done
    monkeypatch.setattr("unicl_fast.pipelines.crops._CROPPED_AT_ONCE", 4 * BATCH)
    count = 400
    whole = make_loader(sets["raw"], prompts)
    expected = take(whole, count=count)
    assert whole.reading.num_threads == 2
    datasets = opened()
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


def test_evaluation_shows_the_pixels_of_files_and_names_damage(sets, folders, opened):
    data = config_of().data
    expected, shown = (
        next(iter(EvaluationLoader(sets[form][0], data, batch_size=64))) for form in ("png", "raw")
    )
    assert torch.equal(shown.images, expected.images)
    flip_pixel(folders[LABELLED], 3)
    with pytest.raises(DamagedSampleError, match=r"sample 0000000003 .*pixels\.npy.*checksum"):
        list(EvaluationLoader(opened()[LABELLED], data, batch_size=5))
