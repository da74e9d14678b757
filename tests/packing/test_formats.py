"""`unicl-pack build --format`: files, and pixels (raw); the other sub-commands on what it makes."""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from bad_entries import CrashingOnce
from inline_checks import check_inline
from pack_runs import build_set, jpeg
from packed_sets import saved
from PIL import Image

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.check import check_image
from unicl_fast.images.limits import ImageFormat
from unicl_fast.packing.build import BuildSummary
from unicl_fast.packing.workers import ImageOptions, Task, make_chunks

FILES = ("jpeg", "webp", "png", "ppm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine plain JPEGs and one image each of other kinds, 32 x 24, and one that is none."""
    root = tmp_path_factory.mktemp("images")
    for name in ("cat", "dog"):
        (root / name).mkdir()
    for number in range(9):
        (root / ("cat", "dog")[number % 2] / f"{number}.jpg").write_bytes(jpeg(number))
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    rgb = Image.fromarray(noise).resize((32, 24), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 8
    rgb.save(root / "cat" / "plain.webp")
    rgb.save(root / "cat" / "plain.png")
    rgb.convert("L").save(root / "cat" / "grey.png")
    rgb.convert("RGBA").save(root / "dog" / "alpha.png")
    rgb.convert("CMYK").save(root / "dog" / "cmyk.jpg")
    rgb.transpose(Image.Transpose.ROTATE_90).save(root / "dog" / "turned.jpg", exif=exif)
    (root / "dog" / "cut.jpg").write_bytes(jpeg(1)[:300] + b"\xff\xd9")
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder in every format."""
    out = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        check_inline(patch)
        for format in get_args(ImageFormat):
            build_set([folder], out / format, format=format)
    return {format: out / format for format in get_args(ImageFormat)}


def names_of(folder: Path) -> set[str]:
    """Extensions of all members of all shards."""
    lines = [line for path in folder.glob("*.idx") for line in path.read_text().splitlines()[1:]]
    return {field for line in lines for field in line.split()[::4]}


def test_all_become_files_of_the_format_and_show_the_same(packed):
    for format, extension in (("jpeg", "jpg"), ("webp", "webp"), ("png", "png"), ("ppm", "ppm")):
        assert names_of(packed[format]) == {extension, "json"}
    assert names_of(packed["keep"]) == {"jpg", "png", "json"}
    versions = {format: Manifest.load(folder).version for format, folder in packed.items()}
    assert versions == {"keep": 1, "jpeg": 1, "png": 1, "raw": 2, "webp": 3, "ppm": 5}
    with PackedDataset(packed["raw"]) as raw:
        for format in FILES:
            with PackedDataset(packed[format]) as dataset:
                assert len(dataset) == len(raw) == 15
                for index in range(len(raw)):
                    file = io.BytesIO(raw.image_bytes(index).tobytes())
                    pixels = np.asarray(Image.open(file)).astype(int)
                    data = dataset.image_bytes(index, verify=True).tobytes()
                    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                    difference = np.abs(shown - pixels)
                    if format in ("png", "ppm"):
                        assert difference.max() == 0
                    else:  # quality 90, chroma at half the size
                        assert difference.mean() < 5


def test_the_program_scales_counts_and_writes_what_it_did(folder, tmp_path, pack):
    told = tmp_path / "told.json"
    text = pack(
        *("build", "--workers", 1, folder, "--out", tmp_path / "out", "--format", "webp"),
        *("--resize", "short:12", "--quality", 40, "--json", told),
    )
    assert "15 re-encoded as WebP q40, 0 copied unchanged" in text
    summary: dict[str, Any] = json.loads(told.read_text())
    assert summary.keys() == set(BuildSummary.__dataclass_fields__)
    assert (summary["manifest"]["num_samples"], summary["num_reencoded"]) == (15, 15)
    assert summary["manifest"]["num_quarantined"] == 1
    with PackedDataset(tmp_path / "out") as dataset:
        assert set(dataset.samples["height"].tolist()) == {12}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_sizes_that_differ_are_named_and_squares_are_the_way_out(tmp_path, pack):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    for number, size in enumerate([(20, 20), (20, 21), (50, 33), (1, 300), (8, 8)]):
        Image.fromarray(noise(*size)).save(tmp_path / "in" / "cat" / f"{number}.png")
    words = "build", "--workers", 1, "--format", "raw", tmp_path / "in", "--out", tmp_path / "out"
    text = pack(*words, code=2)
    assert "--format raw needs images of one size" in text
    assert text.count("cat/") == 2
    assert "--resize square:" in text
    assert os.listdir(tmp_path) == ["in"]
    assert "decoded, 20 x 20 pixels each" in pack(*words, "--resize", "square:20")
    pixels = np.load(tmp_path / "out" / "pixels.npy")
    assert pixels.shape == (5, 20, 20, 3)
    assert any(np.array_equal(image, noise(20, 20)) for image in pixels)
    assert any(np.array_equal(image, noise(20, 21)[:, :20]) for image in pixels)


def test_chunks_are_as_small_as_answers_are_large():
    entry = CrashingOnce("/", b"")
    options = ImageOptions(short_side=0, quality=90, max_pixels=10**6, seconds=1)
    for answer_bytes, longest in ((3072, 128), (150_000, 27), (4_000_000, 1), (10**9, 1)):
        tasks = (Task(name="", entry=entry, answer_bytes=answer_bytes) for _ in range(200))
        assert max(map(len, make_chunks(tasks, options))) == longest
    files = (Task(name="", entry=CrashingOnce("/", b"", num_bytes=100_000)) for _ in range(50))
    assert max(map(len, make_chunks(files, dataclasses.replace(options, format="png")))) == 5


@pytest.mark.parametrize("size", [(40, 40), (10, 10), (31, 64), (64, 31), (20, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_squares_show_the_middle(size, channels):
    pixels = noise(*size, channels)
    data = saved(Image.fromarray(pixels.squeeze()), format="PNG")
    image = check_image(data, square_side=20, format="raw")
    assert (image.height, image.width) == (20, 20)
    found = np.frombuffer(image.data, np.uint8).reshape(20, 20, 3)
    edge = min(size)
    top, left = ((side - edge) // 2 for side in size)
    middle = Image.fromarray(pixels.squeeze()).convert("RGB")
    twin = middle.crop((left, top, left + edge, top + edge)).resize(
        (20, 20), Image.Resampling.BICUBIC
    )
    inner = slice(3, -3)  # nearer to the edge the filter sees what lies beyond the square
    gap = np.abs(found[inner, inner].astype(int) - np.asarray(twin)[inner, inner])
    assert gap.max() <= 1
    if size == (20, 20):
        assert np.array_equal(found, np.broadcast_to(pixels, found.shape))
