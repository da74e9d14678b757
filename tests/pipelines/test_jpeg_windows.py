"""A JPEG cut down to its window's part gives the same pixels; what cannot be cut stays as it is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unicl_fast.config import DataConfig
from unicl_fast.picture_encoding import encode_jpeg, restart_interval
from unicl_fast.pipelines.crop import random_windows
from unicl_fast.pipelines.feed import HostBatch, run_graphs
from unicl_fast.pipelines.graph import build_train_graph
from unicl_fast.pipelines.jpeg_windows import cut_to_windows

SUBSAMPLINGS = ("420", "422", "444", "grey")


def array_of(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(data, dtype=np.uint8).copy()


def decoded(data: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data.tobytes())))


def noise(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth enough to be like a picture, with every block and colour different."""
    generator = np.random.default_rng(height * 1000 + width)
    small = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray[Any, Any], subsampling: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if subsampling == "grey":
        return array_of(encode_jpeg(pixels[:, :, :1], quality=90, subsampling="420"))
    return array_of(encode_jpeg(pixels, quality=90, subsampling=subsampling))


def cut_one(
    data: np.ndarray[Any, Any], start: tuple[int, int], shape: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
    (cut,), places = cut_to_windows([data], np.int32([start]), np.int32([shape]))
    return cut, (int(places[0, 0]), int(places[0, 1]))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@given(values=st.data())
@settings(max_examples=40, deadline=None)
def test_windows_of_any_picture_have_the_same_pixels(
    subsampling: str, values: st.DataObject
) -> None:
    height = values.draw(st.integers(128, 300), label="height")
    width = values.draw(st.integers(128, 300), label="width")
    top = values.draw(st.integers(0, height - 1), label="top")
    left = values.draw(st.integers(0, width - 1), label="left")
    rows = values.draw(st.integers(1, height - top), label="rows")
    columns = values.draw(st.integers(1, width - left), label="columns")
    whole = encoded(noise(height, width), subsampling)
    cut, (row, column) = cut_one(whole, (top, left), (rows, columns))
    np.testing.assert_array_equal(
        decoded(cut)[row : row + rows, column : column + columns],
        decoded(whole)[top : top + rows, left : left + columns],
    )
    assert len(cut) <= len(whole)
    if rows <= height // 2 and columns <= width // 4:
        assert len(cut) < 0.75 * len(whole)


def test_the_graph_makes_the_same_squares_of_real_photographs(shared_data: Path) -> None:
    files = sorted((shared_data / "decode" / "images").glob("*.JPEG"))[:32]
    pictures, sizes = [], []
    for file in files:
        image = Image.open(file).convert("RGB")
        image.thumbnail((400, 400))
        pictures.append(array_of(encode_jpeg(np.asarray(image), quality=90, subsampling="420")))
        sizes.append((image.height, image.width))
    heights, widths = np.array(sizes).T
    law = {"key": 5, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
    starts, shapes = random_windows(heights, widths, np.arange(len(files)), **law)
    cut, places = cut_to_windows(pictures, starts, shapes)
    assert sum(map(len, cut)) < 0.75 * sum(map(len, pictures))
    rest = (shapes, np.zeros((len(files), 1), np.int32), np.zeros((len(files), 1), np.int64))
    squares = [
        graph_output((pictures, starts, *rest), len(files)),
        graph_output((cut, places, *rest), len(files)),
    ]
    assert torch.equal(*squares)
    assert len(torch.unique(squares[0])) > 200


def graph_output(inputs: tuple[Any, ...], size: int) -> torch.Tensor:
    data, device = DataConfig(image_size=64, threads=1), torch.device("cpu")
    outputs = run_graphs(
        [lambda source: build_train_graph(source, data=data, batch_size=size, device=device)],
        iter([HostBatch(inputs=inputs, facts=None)]),
        device=device,
        ahead=1,
    )
    ((images, _), _) = next(outputs)
    images = images.clone()
    outputs.close()
    return images


def test_what_has_no_places_to_cut_at_stays_the_same_object() -> None:
    pixels = noise(200, 200)
    files = []
    for options in (
        {"format": "JPEG"},
        {"format": "JPEG", "progressive": True, "restart_marker_rows": 1},
        {"format": "JPEG", "restart_marker_blocks": 5},  # rows of 13 do not begin with one
        {"format": "PNG"},
        {"format": "WEBP"},
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, **options)
        files.append(array_of(file.getvalue()))
    files.append(array_of(b""))
    files.append(array_of(b"\xff\xd8\xff"))
    starts = np.full((len(files), 2), 8, np.int32)
    cut, places = cut_to_windows(files, starts, np.full_like(starts, 30))
    assert all(one is other for one, other in zip(cut, files, strict=True))
    assert (places == starts).all()


@pytest.mark.parametrize(
    ("start", "shape"), [((-1, 0), (10, 10)), ((0, 195), (10, 10)), ((5, 5), (0, 5))]
)
def test_windows_that_are_not_in_the_picture_are_left_to_the_decoder(
    start: tuple[int, int], shape: tuple[int, int]
) -> None:
    whole = encoded(noise(200, 200), "420")
    assert cut_one(whole, start, shape)[0] is whole


def test_a_file_that_ends_early_is_left_to_the_decoder() -> None:
    """Above all, it must not become a shorter one that is sound."""
    whole = encoded(noise(200, 200), "420")
    for length in range(0, len(whole) - 1, 97):
        part = whole[:length].copy()
        assert cut_one(part, (150, 20), (50, 30))[0] is part


FUZZ = """
import numpy as np, sys
from unicl_fast.pipelines.jpeg_windows import cut_to_windows

whole = np.load(sys.argv[1])
generator = np.random.default_rng(0)
num_cut = 0
for turn in range(3000):
    data = whole.copy()
    for _ in range(generator.integers(1, 5)):
        anywhere = generator.integers(len(data) if turn % 2 else 700)
        data[anywhere] = generator.choice([0, 1, 0xC0, 0xD0, 0xD9, 0xDA, 0xFF, data[anywhere] ^ 1])
    data = data[: generator.integers(len(data)) if turn % 5 == 0 else None]
    start = generator.integers(0, 150, (1, 2)).astype(np.int32)
    shape = generator.integers(1, 51, (1, 2)).astype(np.int32)
    (cut,), places = cut_to_windows([data], start, shape)
    assert len(cut) <= len(data) and (places <= start).all() and (places >= 0).all()
    num_cut += cut is not data
print(num_cut)
"""


def test_damaged_files_lead_nowhere_else(tmp_path: Path) -> None:
    """With every index checked, which compiled code does not do by itself."""
    np.save(tmp_path / "whole.npy", encoded(noise(200, 200), "420"))
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path / "whole.npy")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert 300 < int(result.stdout) < 2700


@pytest.mark.parametrize(
    ("height", "width", "block_width", "expected"),
    [
        (256, 341, 16, 2),  # 22 blocks
        (384, 256, 16, 2),  # 16
        (256, 384, 16, 3),  # 24
        (256, 272, 16, 1),  # 17, a prime
        (256, 256, 8, 4),  # 32
        (127, 400, 16, 0),
        (32, 32, 8, 0),
    ],
)
def test_some_eight_stretches_a_row(
    height: int, width: int, block_width: int, expected: int
) -> None:
    assert restart_interval(height, width, block_width=block_width) == expected
