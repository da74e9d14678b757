"""Images that look alike are found, all of them, and others are not."""

from __future__ import annotations

import importlib.util
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from property_tests import examples

from unicl_fast.packing.near_duplicates import (
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
@examples(60)
def test_pairs_are_those_that_comparing_all_with_all_finds(
    hashes: list[int], distance: int
) -> None:
    distinct = list(dict.fromkeys(hashes))
    found = near_pairs(np.array(distinct, np.uint64), distance)
    assert found.tolist() == all_pairs(distinct, distance)


@given(hashes=clustered(), distance=st.integers(0, 12))
@examples(60)
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


def search_time(count: int) -> float:
    """Seconds for random hashes, of which one in a hundred has a copy; checks what is found."""
    hashes = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
    num_copies = count // 100
    hashes[-num_copies:] = hashes[:num_copies] ^ np.uint64(0b1011)
    started = time.perf_counter()
    leaders = find_leaders(hashes, 4)
    seconds = time.perf_counter() - started
    expected = np.arange(count)
    expected[-num_copies:] = np.arange(num_copies)
    assert (leaders == expected).all()
    return seconds


def test_a_hundred_thousand_hashes_take_no_time() -> None:
    """Comparing all with all would be 5 billion steps."""
    assert search_time(100_000) < 30


@pytest.mark.slow
def test_a_million_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    times = sorted(search_time(1_000_000) for _ in range(3))
    with capsys.disabled():
        print(f"\na million hashes within 4 bits: {', '.join(f'{one:.1f}' for one in times)} s")
    assert times[1] < 120


def test_what_is_all_alike_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicl_fast.packing.near_duplicates.MAX_PAIRS", 1000)
    hashes = np.array([number ^ (number >> 1) for number in range(60)], np.uint64)
    with pytest.raises(ValueError, match="choose a smaller distance"):
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
    from unicl_fast.packing.near_duplicates import perceptual_hash

    folder = shared_data / "captions" / "flickr8k"
    lines = (folder / "captions.jsonl").read_text().splitlines()[:50]
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
    assert leaders[:50].tolist() == list(range(50))
    assert leaders[50:].tolist() == np.repeat(np.arange(50), 5).tolist()


@pytest.mark.slow
def test_how_far_copies_are_from_their_originals(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of docs/data.md."""
    from unicl_fast.packing.near_duplicates import perceptual_hash

    paths = sorted((shared_data / "captions" / "flickr8k" / "images").iterdir())
    hashes = np.array([perceptual_hash(path.read_bytes()) for path in paths], np.uint64)
    distances: dict[str, list[int]] = {}
    for path, value in zip(paths, hashes[:200].tolist(), strict=False):
        image = Image.open(path).convert("RGB")
        width, height = image.size
        border = width // 40, height // 40
        copies = {
            "JPEG at quality 20": encoded(image, quality=20),
            "half the size": encoded(image.resize((width // 2, height // 2))),
            "twice the size": encoded(image.resize((width * 2, height * 2))),
            "grey": encoded(image.convert("L")),
            "a tenth higher": encoded(image.resize((width, int(height * 1.1)))),
            "a fifth brighter": encoded(image.point(lambda level: min(255, int(level * 1.2)))),
            "a fortieth cut from each side": encoded(
                image.crop((*border, width - border[0], height - border[1]))
            ),
            "mirrored": encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        }
        for how, data in copies.items():
            distances.setdefault(how, []).append((perceptual_hash(data) ^ value).bit_count())
    between = count_bits(hashes[:, None] ^ hashes[None])[np.triu_indices(len(hashes), 1)]
    with capsys.disabled():
        print()
        for how, values in distances.items():
            found = [100 * np.mean(np.array(values) <= limit) for limit in (2, 4, 8)]
            shares = " / ".join(f"{share:.0f} %" for share in found)
            print(f"{how:30s} median {np.median(values):2.0f}, within 2 / 4 / 8 bits: {shares}")
        print(f"{len(between):,} pairs of others: least {between.min()}, mean {between.mean():.1f}")
    for how in ("JPEG at quality 20", "half the size", "twice the size", "grey", "a tenth higher"):
        assert max(distances[how]) <= 4
    assert between.min() > 10
