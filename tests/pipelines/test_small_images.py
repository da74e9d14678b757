"""Small images are decoded without DALI: the same batches, and the same substitutes of bad ones."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from damage import copy_of, flip_byte, store, undecodable
from loader_runs import (
    assert_joined,
    assert_same,
    config_of,
    count_replaced,
    prompts_of,
    rows_of,
    take,
)
from packed_sets import Sample, pack, saved
from PIL import Image

from unicl_fast.config import RunConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.codec import decode_files
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.dali

STEPS = 8
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
    folder = tmp_path_factory.mktemp("small") / "set"
    names = ["cat", "dog", "yak"]
    with pack(folder, samples, class_names=names, tokenizer=tokenizer, format="packed") as dataset:
        yield dataset


@pytest.fixture
def make_loader(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> Callable[..., TrainLoader]:
    """A loader by DALI, or without it."""

    def make(dataset: PackedDataset, form: str, **more: Any) -> TrainLoader:
        are_small = "unicl_fast.pipelines.train_loader.are_small_jpegs"
        monkeypatch.setattr(are_small, lambda *_: form == "crops")
        ranks = {key: more.pop(key) for key in ("rank", "world_size", "quarantine") if key in more}
        config, prompts = config_of(batch=16, **more), prompts_of([dataset], tokenizer)
        loader = TrainLoader(config, [dataset], None, prompts, **ranks)
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
    names = ["cat", "dog"]
    samples = [Sample(file, labels=[i % 2]) for i in range(8)]
    with pack(
        tmp_path / "set", samples, class_names=names, tokenizer=tokenizer, format="packed"
    ) as dataset:
        config = TrainConfig(run=RunConfig(global_batch_size=4))
        prompts = prompts_of([dataset], tokenizer)
        assert TrainLoader(config, [dataset], None, prompts).form == form


@pytest.mark.parametrize(
    "more",
    [{}, {"interpolation": "bicubic"}, {"augment": ("unicl",)}],
    ids=["plain", "bicubic", "unicl"],
)
def test_batches_are_those_of_dali(small, make_loader, more):
    by_dali = take(make_loader(small, "files", **more), count=STEPS)
    assert_same(take(make_loader(small, "crops", **more), count=STEPS), by_dali)
    for step in (3, 5):
        assert_same(take(make_loader(small, "crops", **more), start=step, count=1), [by_dali[step]])
    parts = [
        take(make_loader(small, "crops", rank=rank, world_size=2, **more), count=STEPS)
        for rank in range(2)
    ]
    for step, expected in enumerate(by_dali):
        assert_joined([part[step] for part in parts], expected)


@pytest.mark.parametrize("group", [2048, 8], ids=["groups", "large"])
def test_bad_ones_are_replaced_as_by_dali(
    small, make_loader, tmp_path,
    monkeypatch, group,
):  # fmt: skip
    """In groups of batches, and in a batch that threads share."""
    monkeypatch.setattr("unicl_fast.pipelines.crops._CROPPED_AT_ONCE", group)
    expected = take(make_loader(small, "files"), count=STEPS)
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
            form: take(make_loader(spoilt, form, quarantine=tmp_path / f"{form}.csv"), count=STEPS)
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
