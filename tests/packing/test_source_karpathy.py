"""Karpathy's splits of COCO and Flickr, of real photographs and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign_sources import read_source

from unicl_fast.packing.sources.rows import LEFT_OUT, ListOptions

SPLITS = ("train", "val", "test", "restval")


@pytest.fixture
def file(tmp_path: Path, shared_data: Path) -> Path:
    """Sixteen images of Flickr8k, four of each split, in the form of dataset_coco.json."""
    flickr = shared_data / "captions" / "flickr8k"
    lines = (flickr / "captions.jsonl").read_text().splitlines()[:16]
    images: list[dict[str, Any]] = []
    for number, sample in enumerate(map(json.loads, lines)):
        sentences = [
            {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": n}
            for n, text in enumerate(sample["captions"])
        ]
        place = {"filepath": "images", "filename": Path(sample["image"]).name}
        own = {"imgid": number, "split": SPLITS[number % 4], "sentences": sentences}
        images.append(place | own)
    path = tmp_path / "dataset_flickr8k.json"
    path.write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return path


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ((), range(16)),
        (("split=test",), range(2, 16, 4)),
        (("split=train",), [n for n in range(16) if n % 4 in (0, 3)]),
        (("split=restval",), range(3, 16, 4)),
    ],
)
@pytest.mark.parametrize("folder", ["", "images"])
def test_a_split_has_its_images_with_all_their_captions(
    file: Path, shared_data: Path, where: tuple[str, ...], numbers: list[int], folder: str
) -> None:
    flickr = shared_data / "captions" / "flickr8k"
    options = ListOptions(image_root=str(flickr / folder), where=where)
    source = read_source(file, options)
    lines = (flickr / "captions.jsonl").read_text().splitlines()[:16]
    expected = [json.loads(lines[number]) for number in numbers]
    assert [item.captions for item in source.items] == [one["captions"] for one in expected]
    for item, one in zip(source.items, expected, strict=True):
        assert item.problem is None
        assert item.entry is not None
        assert item.entry.read() == (flickr / one["image"]).read_bytes()
    assert source.passed_over[LEFT_OUT] == 16 - len(expected)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(file: Path) -> None:
    with pytest.raises(ValueError, match=r"split=dev; its splits are train \(4\), val \(4\)"):
        read_source(file, ListOptions(where=("split=dev",)))


def test_what_cannot_be_packed_is_named(file: Path) -> None:
    content = json.loads(file.read_text())
    content["images"] = content["images"][:4]
    changes: list[dict[str, Any]] = [
        {"filename": 7},
        {"sentences": []},
        {"sentences": [{"raw": ["x", 3]}]},
        {"filename": "../x"},
    ]
    for image, changed in zip(content["images"], changes, strict=True):
        image |= changed
    content["images"][1]["filename"] = file.name  # something that is there
    content["images"][1]["filepath"] = ""
    content["images"].append(None)
    file.write_text(json.dumps(content))
    source = read_source(file)
    kinds = [item.problem.kind for item in source.items if item.problem]
    assert kinds == ["bad row", "no text", "bad row", "outside", "bad row"]
