"""Filters of `unicl-pack build`: what they leave out is listed by name, with its reason."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_checks import check_inline
from pack_runs import contents, left_out, run_pack
from PIL import Image

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.packing import build as build_module
from unicl_fast.packing.build import build_dataset
from unicl_fast.packing.samples import Samples, filter_captions
from unicl_fast.packing.sources.items import Item, Problem

NAMES = [f"{number:02d}.jpg" for number in range(12)]


def photo(number: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images of several shapes in a list with scores."""
    sizes = {2: (40, 20), 3: (200, 40), 4: (33, 100)}
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(photo(number, sizes.get(number, (64, 64))))
    rows = [
        {"image": name, "captions": [f"a photo of number {i}"], "clip": 0.2 + i / 100}
        for i, name in enumerate(NAMES)
    ]
    rows[5]["clip"] = 0.1
    rows[6]["clip"] = None
    rows[7]["captions"] = ["photo", "a photo of a dog that sleeps"]
    rows[8]["captions"] = ["photo"]
    rows[9] |= {"captions": ["photo"], "label": "dog"}
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


FILTERS: dict[str, Any] = {
    "min_score": ("clip=0.15",),
    "min_caption_words": 2,
    "min_side": 30,
    "max_aspect": 3.0,
}


def captions(out: Path) -> dict[str, list[str]]:
    with PackedDataset(out) as dataset:
        reader = SampleReader(dataset)
        found = [reader.read(index).description for index in range(len(dataset))]
        reader.close()
        return {one.name: list(one.captions) for one in found}


def test_what_each_filter_leaves_out_is_listed_with_its_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_inline(monkeypatch)
    summary = build_dataset([source], tmp_path / "set", progress=False, **FILTERS)
    assert left_out(tmp_path / "set") == {
        "02.jpg": ("too small", "40 x 20 pixels; 30 a side are asked for"),
        "03.jpg": (
            "aspect ratio",
            "200 x 40 pixels; the longer side may have 3 times the shorter",
        ),
        "04.jpg": (
            "aspect ratio",
            "33 x 100 pixels; the longer side may have 3 times the shorter",
        ),
        "05.jpg": ("low score", "clip is 0.1, below 0.15"),
        "06.jpg": ("low score", "clip is None, below 0.15"),
        "08.jpg": ("caption length", "no caption has 2 or more words: 'photo'"),
    }
    assert summary.left_out_by_kind == {
        "low score": 2, "aspect ratio": 2, "too small": 1, "caption length": 1
    }  # fmt: skip
    assert summary.passed_over == {"captions of too few or too many words": 3}
    found = captions(tmp_path / "set")
    assert found.keys() == {"00.jpg", "01.jpg", "07.jpg", "09.jpg", "10.jpg", "11.jpg"}
    assert found["07.jpg"] == ["a photo of a dog that sleeps"]
    assert found["09.jpg"] == []


@pytest.mark.slow
def test_neither_workers_nor_a_stop_leave_a_trace(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FILTERS, "shard_bytes": 1500, "progress": False}
    for workers in (1, 3):
        build_dataset([source], tmp_path / str(workers), workers=workers, **options)
    expected = contents(tmp_path / "1")
    assert contents(tmp_path / "3") == expected
    real = build_module.DatasetWriter.add

    def add(writer: Any, sample: Any) -> None:
        if writer.num_samples == 3:
            raise KeyboardInterrupt
        real(writer, sample)

    with monkeypatch.context() as patch:
        patch.setattr(build_module.DatasetWriter, "add", add)
        with pytest.raises(KeyboardInterrupt):
            build_dataset([source], tmp_path / "cut", workers=1, **options)
    with pytest.raises(ValueError, match="--min-side"):
        build_dataset([source], tmp_path / "cut", workers=1, **options | {"min_side": 31})
    summary = build_dataset([source], tmp_path / "cut", workers=2, **options)
    assert summary.num_taken_over > 0
    assert contents(tmp_path / "cut") == expected


def samples_of(items: list[Item]) -> Samples:
    return Samples(
        len(items),
        lambda numbers: [
            (
                "s",
                Item(one.name, captions=[*one.captions], labels=[*one.labels], problem=one.problem),
            )
            for one in (items[number] for number in numbers)
        ],
    )


def test_captions_of_too_many_words_go_and_damage_keeps_its_reason() -> None:
    items = [
        Item("a", captions=["one two", "one two three four"]),
        Item("b", captions=["it's ten o'clock", "..."]),
        Item("c", captions=["one"], problem=Problem("damaged", "so")),
    ]
    filtered, dropped = filter_captions(samples_of(items), fewest=2, most=3)
    assert [item.captions for _, item in filtered] == [["one two"], ["it's ten o'clock"], ["one"]]
    assert [item.problem and item.problem.kind for _, item in filtered] == [None, None, "damaged"]
    assert dropped == 2


def test_an_image_that_another_row_keeps_is_not_among_those_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_inline(monkeypatch)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows.append(rows[10] | {"captions": ["a low caption"], "clip": 0.1})
    source.write_text("\n".join(map(json.dumps, rows)))
    build_dataset([source], tmp_path / "set", progress=False, min_score=("clip=0.15",))
    listed = left_out(tmp_path / "set")
    assert listed.keys() == {"05.jpg", "06.jpg", "line 13"}
    assert listed["line 13"] == ("low score", "10.jpg: clip is 0.1, below 0.15")
    assert captions(tmp_path / "set")["10.jpg"] == ["a photo of number 10"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-score", "clip"], "--min-score takes COLUMN=NUMBER, not 'clip'"),
        (["--min-score", "clip=nan"], "--min-score takes COLUMN=NUMBER, not 'clip=nan'"),
        (["--min-score", "aesthetic=5"], "has no column 'aesthetic' (--min-score)"),
        (["--max-aspect", "0.5"], "--max-aspect must be 1 or more, not 0.5"),
        (["--min-caption-words", "5", "--max-caption-words", "3"], "must lie in 5 to"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(
    source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, said = run_pack(
        "build", source, "--out", source.parent / "set", *arguments, capsys=capsys
    )
    assert code == 2
    assert message in said
