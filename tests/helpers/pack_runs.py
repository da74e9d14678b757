"""unicl-pack called in this process, small images for it to pack, and a look at what it wrote."""

import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import simplejpeg

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.dataset.writer import MADE_OF_NAME, DatasetWriter, PackedSample
from unicl_fast.packing.build import BuildSummary, build_dataset
from unicl_fast.packing.folder_check import Fault
from unicl_fast.packing.verify import verify_dataset
from unicl_fast.tools.pack.__main__ import main


def jpeg(number: int) -> bytes:
    """An image of 32 x 24 pixels; every number has its own."""
    pixels = np.full((24, 32, 3), (number * 7 % 256, number % 256, 200), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=90))


def write_photos(root: Path, numbers: Iterable[int], classes: tuple[str, ...] = ("cat",)) -> Path:
    """Class folders with `jpeg(number)` as CLASS/NUMBER.jpg, classes in turn; returns `root`."""
    for number in numbers:
        path = root / classes[number % len(classes)] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


def build_set(sources: Sequence[Any], out: str | Path, **options: Any) -> BuildSummary:
    """A build without bars, by one worker unless the options say otherwise."""
    return build_dataset(sources, out, **({"workers": 1, "progress": False} | options))


Pack = Callable[..., str]
"""The fixture `pack`."""


def run_pack(*arguments: object, code: int = 0, capsys: pytest.CaptureFixture[str]) -> str:
    """unicl-pack in this process, which ends with a code: all that was printed."""
    found = 0
    try:
        main([*map(str, arguments)])
    except SystemExit as stop:
        found = int(stop.code or 0)
    printed = "".join(capsys.readouterr())
    assert found == code, printed
    return printed


def stop_at(
    patch: pytest.MonkeyPatch,
    count: int,
    error: BaseException = KeyboardInterrupt(),  # noqa: B008
) -> None:
    """The build raises an error like this one when it has written `count` samples."""
    add = DatasetWriter.add

    def stop(self: DatasetWriter, sample: PackedSample) -> None:
        if self.num_samples == count:
            raise type(error)(*error.args)  # anew: notes are added to it
        add(self, sample)

    patch.setattr(DatasetWriter, "add", stop)


def contents(out: Path) -> dict[str, bytes]:
    """All files of a data set; made-of.json, which holds times and paths, is none."""
    names = sorted(set(os.listdir(out)) - {MADE_OF_NAME})
    return {name: (out / name).read_bytes() for name in names}


def faults_of(folder: Path, *, decode: bool = False) -> list[Fault]:
    """Everything that a verification finds."""
    faults: list[Fault] = []
    verify_dataset(folder, note=faults.append, decode=decode, workers=1, progress=False)
    return faults


class Sample(NamedTuple):
    """Everything that is known of a packed sample, labels as names."""

    source: str
    name: str
    image: bytes
    size: tuple[int, int]
    captions: tuple[str, ...]
    tokens: list[list[int]]
    labels: list[str]


def samples_of(out: Path) -> list[Sample]:
    """All samples of a data set, sorted by source and name."""
    with PackedDataset(out) as dataset, contextlib.closing(SampleReader(dataset)) as reader:
        names, found = dataset.manifest.class_names, []
        for index, row in enumerate(dataset.samples):
            text = reader.read(index).description
            found.append(
                Sample(
                    text.source,
                    text.name,
                    dataset.image_bytes(index, verify=True).tobytes(),
                    (int(row["height"]), int(row["width"])),
                    text.captions,
                    [dataset.caption_tokens(index, n).tolist() for n in range(len(text.captions))],
                    [names[label] for label in dataset.labels_of(index)],
                )
            )
    return sorted(found)


def left_out(out: Path) -> dict[str, tuple[str, str]]:
    """Kind and message of each row of quarantine.csv, by the sample's name; none comes twice."""
    with (out / "quarantine.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {row["name"]: (row["kind"], row["message"]) for row in rows}
    assert len(found) == len(rows)
    return found
