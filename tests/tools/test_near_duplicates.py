"""Pictures that look alike are found, all of them, and others are not."""

from __future__ import annotations

import importlib.util
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unicl_fast.tools.near_duplicates import (
    TooManyPairsError,
    count_bits,
    find_leaders,
    near_pairs,
)


def all_pairs(hashes: list[int], distance: int) -> list[list[int]]:
    return [
        [earlier, later]
        for later in range(len(hashes))
        for earlier in range(later)
        if (hashes[earlier] ^ hashes[later]).bit_count() <= distance
    ]


@st.composite
def clustered(draw: st.DrawFn) -> list[int]:
    """Hashes near a few centres, so that pairs at all distances occur."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=9)
    hashes = []
    for _ in range(draw(st.integers(1, 25))):
        value = draw(st.sampled_from(centres))
        for bit in draw(flips):
            value ^= 1 << bit
        hashes.append(value)
    return hashes


@given(hashes=clustered(), distance=st.integers(0, 12))
@settings(max_examples=60)
def test_pairs_are_those_that_comparing_all_with_all_finds(
    hashes: list[int], distance: int
) -> None:
    distinct = list(dict.fromkeys(hashes))
    found = near_pairs(np.array(distinct, np.uint64), distance)
    assert found.tolist() == all_pairs(distinct, distance)


@given(hashes=clustered(), distance=st.integers(0, 12))
@settings(max_examples=60)
def test_each_follower_is_near_the_first_that_stays(hashes: list[int], distance: int) -> None:
    expected = list(range(len(hashes)))
    for later, value in enumerate(hashes):
        for earlier in range(later):
            stays = expected[earlier] == earlier
            if stays and (hashes[earlier] ^ value).bit_count() <= distance:
                expected[later] = earlier
                break
    assert find_leaders(np.array(hashes, np.uint64), distance).tolist() == expected


def test_bits_are_counted() -> None:
    values = [0, 1, 2**64 - 1, 0x8000000000000001]
    assert count_bits(np.array(values, np.uint64)).tolist() == [0, 1, 64, 2]


def test_a_hundred_thousand_hashes_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing all with all would be 5 billion steps."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64, endpoint=False)
    copies = hashes[:500] ^ np.uint64(0b1011)
    started = time.perf_counter()
    leaders = find_leaders(np.concatenate([hashes, copies]), 4)
    assert time.perf_counter() - started < 20
    assert leaders[100_000:].tolist() == list(range(500))
    assert (leaders[:100_000] == np.arange(100_000)).all()


def test_what_is_all_alike_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicl_fast.tools.near_duplicates.MAX_PAIRS", 1000)
    hashes = np.array([number ^ (number >> 1) for number in range(60)], np.uint64)
    with pytest.raises(TooManyPairsError, match="choose a smaller distance"):
        find_leaders(hashes, 6)
    with pytest.raises(ValueError, match="0 to 12"):
        find_leaders(hashes, 13)


def encoded(image: Image.Image, kind: str = "JPEG", quality: int = 80) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return file.getvalue()


def test_copies_of_photographs_are_within_4_bits_and_other_photographs_are_not(
    shared_data: Path,
) -> None:
    if importlib.util.find_spec("imagehash") is None:
        pytest.skip("ImageHash is not installed: pip install 'unicl_fast[inspect]'")
    from unicl_fast.tools.picture_hashes import perceptual_hash

    folder = shared_data / "captions" / "flickr8k"
    lines = (folder / "captions.jsonl").read_text().splitlines()[:120]
    hashes, copies = [], []
    for line in lines:
        path = folder / json.loads(line)["image"]
        image = Image.open(path).convert("RGB")
        width, height = image.size
        hashes.append(perceptual_hash(path.read_bytes()))
        copies += [
            perceptual_hash(encoded(image, quality=30)),
            perceptual_hash(encoded(image, "PNG")),
            perceptual_hash(encoded(image.resize((width // 2, height // 2)))),
            perceptual_hash(encoded(image.resize((width * 2, height * 2)))),
            perceptual_hash(encoded(image.convert("L"))),
        ]
    leaders = find_leaders(np.array([*hashes, *copies], np.uint64), 4)
    assert leaders[:120].tolist() == list(range(120))
    assert leaders[120:].tolist() == np.repeat(np.arange(120), 5).tolist()
