"""Small packed data sets of real images, made once a session."""

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from damage import copy_of
from loader_runs import prompts_of
from packed_sets import Sample, pack, saved
from PIL import Image

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="session")
def labelled(
    shared_data: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PackedDataset]:
    """61 ImageNet JPEGs at full size, all nine grey ones among them, and one PNG; with labels."""
    folder = shared_data / "decode"
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    grey = [row for row in rows if row["mode"] == "L"]
    rows = grey + [row for row in rows if row["mode"] != "L"][: 60 - len(grey)]
    names = list(dict.fromkeys(row["clip_classname"] for row in rows))
    files = [folder / "images" / Path(row["file"]).name for row in rows]
    samples = [
        Sample(path.read_bytes(), labels=[names.index(row["clip_classname"])])
        for path, row in zip(files, rows, strict=True)
    ]
    samples.append(Sample(saved(Image.open(files[-1]), format="PNG"), labels=samples[-1].labels))
    out = tmp_path_factory.mktemp("packed") / "labelled"
    with pack(out, samples, class_names=names, tokenizer=tokenizer) as dataset:
        yield dataset


@pytest.fixture(scope="session")
def captioned(
    shared_data: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PackedDataset]:
    """50 Flickr8k photos (4:2:0 JPEGs, most at 200 pixels) with five captions each."""
    folder = shared_data / "captions" / "flickr8k"
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    samples = [
        Sample((folder / row["image"]).read_bytes(), captions=row["captions"])
        for row in map(json.loads, lines)
    ]
    out = tmp_path_factory.mktemp("packed") / "captioned"
    with pack(out, samples, class_names=(), tokenizer=tokenizer) as dataset:
        yield dataset


@pytest.fixture(scope="session")
def prompts(
    labelled: PackedDataset, captioned: PackedDataset, tokenizer: Tokenizer
) -> ClassPrompts:
    """Of `labelled` and `captioned`, in this order."""
    return prompts_of([labelled, captioned], tokenizer)


@pytest.fixture
def folders(sound: list[PackedDataset], tmp_path: Path) -> list[Path]:
    """Copies, to be spoilt, of a test module's `sound` data sets."""
    return [copy_of(dataset, tmp_path / dataset.folder.name) for dataset in sound]


@pytest.fixture
def spoilt(folders: list[Path]) -> Iterator[Callable[[], list[PackedDataset]]]:
    """Opens the copies, once they are spoilt; they are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda: [
            stack.enter_context(PackedDataset(folder, max_bad_fraction=1.0)) for folder in folders
        ]
