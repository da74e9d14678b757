"""`unicl-pack build --split`: each class is divided, and no image is on both sides."""

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_runs import build_set, jpeg, samples_of
from packed_sets import saved
from PIL import Image
from property_tests import examples

from unicl_fast.packing.split import SIDES, _choose, _join, plain_key

pytestmark = pytest.mark.usefixtures("checked")


@given(
    strata=st.lists(st.integers(-1, 3), min_size=1, max_size=80),
    pairs=st.lists(st.tuples(st.integers(0, 79), st.integers(0, 79)), max_size=20),
    fraction=st.floats(0.05, 0.5),
)
@examples(100)
def test_groups_stay_whole_and_each_class_keeps_its_fraction(strata, pairs, fraction):
    pairs = [pair for pair in pairs if max(pair) < len(strata)]
    leaders = np.arange(len(strata))
    for some in (pairs[::2], pairs[1::2]):
        leaders = _join(leaders, np.array(some, int).reshape(-1, 2))
    held_out = _choose(np.array(strata), leaders, fraction=fraction, seed=3)
    other = _choose(np.zeros(80, int), np.arange(80), fraction=fraction, seed=4)
    assert (other != _choose(np.zeros(80, int), np.arange(80), fraction=fraction, seed=3)).any()
    for one, other in pairs:
        assert leaders[one] == leaders[other] <= min(one, other)
        assert held_out[one] == held_out[other]
    if len(set(leaders)) < len(strata):
        return
    for stratum, count in Counter(strata).items():
        found = held_out[np.array(strata) == stratum].sum()
        if stratum < 0:  # what cannot be packed
            assert not found
        else:
            assert count - found >= 1
            assert abs(found - fraction * count) <= 2


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A list of 120 images in 3 categories: pairs of one product, some images twice, one bad."""
    rows: list[dict[str, Any]] = []
    for number in range(120):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number % 100))
        rows.append(
            {
                "image": f"{number}.jpg",
                "title": f"product {number // 2}" if number % 10 else " ",
                "category": ("shoe", "hat", "sock")[number // 40],
                "department": "feet" if number // 40 != 1 else "heads",
                # 7, "7\u200b ", and "7.0": no person sees a difference
                "product": (number // 2, f"{number // 2}\u200b ", f"{number // 2}.0")[number % 3],
            }
        )
    (tmp_path / "cut.jpg").write_bytes(jpeg(1)[:200])
    rows += [rows[0], rows[1] | {"image": "cut.jpg"}]
    (tmp_path / "shop.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "shop.jsonl"


COLUMNS = {"caption_column": ["title"], "label_column": ["category", "department"]}


def test_both_sides_share_classes_and_no_image(shop, tmp_path, pack):
    out = tmp_path / "packed"
    arguments = [
        *("--caption-column", "title", "--label-column", "category", "department"),
        *("--group-column", "product", "--split", "0.8", "--json", tmp_path / "told.json"),
    ]
    text = pack("build", shop, "--out", out, *arguments)
    assert sorted(os.listdir(out)) == ["held-out", "train"]
    train, held_out = (samples_of(out / side) for side in ("train", "held-out"))
    assert len(train) + len(held_out) == 120
    assert f"{out}/train: {len(train)} images" in text
    assert f"\n{out}/held-out: {len(held_out)} images" in text
    assert not {one.image for one in train} & {one.image for one in held_out}
    # of images 0 to 19, which are there again as 100 to 119, all of a product are on one side
    products = [{int(one.name[:-4]) // 2 % 50 for one in side} for side in (train, held_out)]
    assert not products[0] & products[1]
    counts = Counter(one.labels[0] for one in held_out)
    assert all(6 <= counts[name] <= 10 for name in ("shoe", "hat", "sock"))
    assert {tuple(one.labels) for one in train} == {
        ("shoe", "feet"), ("hat", "heads"), ("sock", "feet")
    }  # fmt: skip
    assert "note: 1 row of an image that an earlier row names\n" in text
    assert "note: 13 rows without a caption, where others have one\n" in text
    assert "note: 121 images kept on one side with others" in text
    assert "note: 60 spellings of values of --group-column that mean an earlier one" in text
    assert "left out: 1, listed in" in text
    command = f"--data.train {out}/train --data.evaluate {out}/held-out --out runs/first"
    assert f"next: unicl-pretrain --preset auto {command}" in text
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["held_out"]["manifest"]["num_samples"] == len(held_out)
    text = pack("build", shop, "--out", out, *arguments)
    assert text.count("complete already") == 1
    text = pack("build", out, "--out", tmp_path / "again", code=2)
    assert f"name one, or each: {out}/held-out {out}/train" in text
    assert f"it holds some; name {out}/held-out or {out}/train" in pack("inspect", out, code=2)


def test_packed_sets_are_divided_by_their_checksums(shop, tmp_path):
    build_set([shop], tmp_path / "whole", **COLUMNS)
    summary = build_set([tmp_path / "whole"], tmp_path / "set", split=0.8)
    assert summary.manifest.num_samples + summary.held_out.manifest.num_samples == 120
    counts = (side.manifest.num_quarantined for side in (summary, summary.held_out))
    assert [*counts] == [1, 0]
    assert summary.num_copies + summary.held_out.num_copies == 20
    sides = [{one.image for one in samples_of(tmp_path / "set" / side)} for side in SIDES]
    assert sides[0].isdisjoint(sides[1])


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("A-1", "A-1"),
        (" A-1\u00a0", "A-1"),
        ("\ufeffA-\u200b1", "A-1"),
        ("\uff21-\uff11", "A-1"),
        ("a-1", "a-1"),  # another product's, perhaps
        ("cafe\u0301", "caf\u00e9"),
        ("red\t shirt", "red shirt"),
        ("7.0", "7"),
        ("7.50", "7.50"),
        ("007", "007"),
        ("\u200b ", ""),
    ],
)
def test_keys_are_equal_if_a_person_sees_no_difference(key, plain):
    assert plain_key(key) == plain


def photograph(number: int) -> Image.Image:
    """Blobs, every number its own: 100 x 80 pixels."""
    values = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((100, 80), Image.Resampling.BICUBIC)


def copies_of(number: int) -> dict[str, bytes]:
    image = photograph(number)
    original = saved(image, format="JPEG", quality=95)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    segment = exif.tobytes()
    length = (len(segment) + 2).to_bytes(2, "big")
    exact = Image.open(io.BytesIO(original)).convert("RGB")
    return {
        "0.jpg": original,
        "bytes.jpg": original,
        "comment.jpg": original[:2] + b"\xff\xfe\0\7hello" + original[2:],
        "exif.jpg": original[:2] + b"\xff\xe1" + length + segment + original[2:],
        "newline.jpg": original + b"\n",
        "fast.png": saved(exact, format="PNG", compress_level=1),
        "best.png": saved(exact, format="PNG", compress_level=9),
        "bitmap.bmp": saved(exact, format="BMP"),
        "again.jpg": saved(image, format="JPEG", quality=30),
        "half.jpg": saved(image.resize((50, 40)), format="JPEG", quality=80),
        "mirrored.jpg": saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), format="JPEG"),
    }  # fmt: skip


def test_copies_of_an_image_are_on_one_side_and_counted_by_kind(tmp_path):
    for number in range(20):
        for name, data in copies_of(number).items():
            path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}-{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    summary = build_set([tmp_path / "photos"], tmp_path / "set", split=0.8)
    sides = [
        {int(Path(one.name).name.partition("-")[0]) for one in samples_of(tmp_path / "set" / side)}
        for side in ("train", "held-out")
    ]
    assert sides[0].isdisjoint(sides[1])
    assert 2 <= len(sides[1]) <= 6
    found = {kind.partition(",")[0]: count for kind, count in summary.notes.items()}
    assert found["images with the bytes of an earlier one"] >= 20
    assert found["images with the pixels of an earlier one"] >= 20 * 4
    assert found["images that are near copies of an earlier one (saved again"] >= 20 * 2
    assert 20 <= found["images that are near copies of an earlier one"] <= 22  # mirrored
    assert found["images kept on one side with others"] == 20 * 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "1.5"], "--split must be a number in (0, 1), not 1.5"),
        (["--split", "0.9999"], "--split 0.9999 holds none of 121 images out"),
        (["--split", "0.9", "--out", "s3://bucket/set"], "--split needs a folder as --out"),
        (["--split", "0.9", "--out", "."], "holds 0.jpg: name another --out for --split"),
    ],
)
def test_what_cannot_be_divided_is_refused_and_leaves_nothing(
    shop, tmp_path, monkeypatch, arguments, message, pack
):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    words = ["build", "shop.jsonl", "--label-column", "category", "--out", "set", *arguments]
    assert message in pack(*words, code=2)
    assert sorted(os.listdir(tmp_path)) == before
