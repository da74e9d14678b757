"""unicl-pack called in this process, small images for it to pack, and a look at what it wrote."""

from __future__ import annotations

import contextlib
import csv
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import simplejpeg

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.dataset.writer import MADE_OF_NAME
from unicl_fast.tools.pack.__main__ import main


def jpeg(number: int) -> bytes:
    """An image of 32 x 24 pixels; every number has its own."""
    pixels = np.full((24, 32, 3), (number * 7 % 256, number % 256, 200), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=90))


def run_pack(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and all that was printed."""
    try:
        main([*map(str, arguments)])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def contents(out: Path) -> dict[str, bytes]:
    """All files of a data set; made-of.json, which holds times and paths, is none."""
    names = sorted(set(os.listdir(out)) - {MADE_OF_NAME})
    return {name: (out / name).read_bytes() for name in names}


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
