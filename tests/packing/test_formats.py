"""`unicl-pack build --format jpeg|webp|png|ppm`, and the other sub-commands on what it makes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pack_runs import Pack, build_set, jpeg
from PIL import Image

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.check import ImageFormat
from unicl_fast.packing.build import BuildSummary

pytestmark = pytest.mark.dist

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
    for format in get_args(ImageFormat):
        build_set([folder], out / format, format=format)
    return {format: out / format for format in get_args(ImageFormat)}


def names_of(folder: Path) -> set[str]:
    """Extensions of all members of all shards."""
    lines = [line for path in folder.glob("*.idx") for line in path.read_text().splitlines()[1:]]
    return {field for line in lines for field in line.split()[::4]}


def test_all_become_files_of_the_format_and_show_the_same(packed: dict[str, Path]) -> None:
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
                    pixels = raw.pixels_of(raw.image_bytes(index)).astype(int)
                    data = dataset.image_bytes(index, verify=True).tobytes()
                    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                    difference = np.abs(shown - pixels)
                    if format in ("png", "ppm"):
                        assert difference.max() == 0
                    else:  # quality 90, chroma at half the size
                        assert difference.mean() < 5


def test_verify_inspect_and_build_take_every_format(
    packed: dict[str, Path], tmp_path: Path, pack: Pack
) -> None:
    sets = [packed[format] for format in FILES]
    code, text = pack("build", "--workers", 1, *sets, "--out", tmp_path / "all")
    assert code == 0, text
    with PackedDataset(tmp_path / "all") as dataset:
        assert len(dataset) == 60
    assert names_of(tmp_path / "all") == {"jpg", "webp", "png", "ppm", "json"}
    code, text = pack("verify", tmp_path / "all", "--workers", 1)
    assert code == 0, text
    assert "60 decoded" in text
    assert Manifest.load(tmp_path / "all").version == 5
    page = tmp_path / "page.html"
    code, text = pack(*("inspect", packed["webp"], "--workers", 1, "--html", page))
    assert code == 0, text
    assert page.read_text().count("<img") >= 15


def test_the_program_scales_counts_and_writes_what_it_did(
    folder: Path, tmp_path: Path, pack: Pack
) -> None:
    told = tmp_path / "told.json"
    code, text = pack(
        "build",
        "--workers",
        1,
        *(folder, "--out", tmp_path / "out", "--format", "webp", "--resize", "short:12"),
        *("--quality", 40, "--json", told),
    )
    assert code == 0
    assert "15 re-encoded as WebP q40, 0 copied unchanged" in text
    summary: dict[str, Any] = json.loads(told.read_text())
    assert summary.keys() == set(BuildSummary.__dataclass_fields__)
    assert (summary["num_samples"], summary["num_reencoded"]) == (15, 15)
    assert summary["num_quarantined"] == 1
    with PackedDataset(tmp_path / "out") as dataset:
        assert set(dataset.samples["height"].tolist()) == {12}
