"""Images that look alike are found, all of them, and others are not."""

import time
from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed_sets import saved
from PIL import Image
from property_tests import examples

from unicl_fast.packing.looks import LOOK, look_at
from unicl_fast.packing.near_duplicates import count_bits, find_copies, find_leaders, near_pairs


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
def test_pairs_and_leaders_are_those_that_comparing_all_with_all_finds(hashes, distance):
    found = near_pairs(np.array(hashes, np.uint64), distance)
    assert found.tolist() == all_pairs(hashes, distance)
    expected = list(range(len(hashes)))
    for later, value in enumerate(hashes):
        for earlier in range(later):
            stays = expected[earlier] == earlier
            if stays and (hashes[earlier] ^ value).bit_count() <= distance:
                expected[later] = earlier
                break
    assert find_leaders(np.array(hashes, np.uint64), distance).tolist() == expected


@pytest.mark.parametrize("count", [5, 300])
def test_images_of_one_hash_that_look_different_hide_no_copies(count):
    """The last two are copies of the second and, by another hash and mirrored, of the third."""
    rng = np.random.default_rng(0)
    looks = np.zeros(count, LOOK)
    looks["hash"], looks["mirrored"] = 5, rng.integers(0, 2**64, count, np.uint64)
    looks["thumbnail"] = rng.integers(0, 256, looks["thumbnail"].shape, np.uint8)
    looks["thumbnail"][-2:] = looks["thumbnail"][1:3]
    looks["hash"][-1], looks["mirrored"][-1] = rng.integers(0, 2**64, 1, np.uint64)[0], 4
    looks["thumbnail"][-1] = looks["thumbnail"][-1, :, ::-1]
    pairs, are_mirrored = find_copies(looks)
    assert pairs.tolist() == [[1, count - 2], [2, count - 1]]
    assert are_mirrored.tolist() == [False, True]


def test_many_hashes_take_no_time():
    """One in a hundred has a copy. Comparing all with each other would be 5 billion steps."""
    count = 100_000
    hashes = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
    copies, expected = count // 100, np.arange(count)
    hashes[-copies:] = hashes[:copies] ^ np.uint64(0b1011)
    expected[-copies:] = np.arange(copies)
    started = time.process_time()
    assert (find_leaders(hashes, 4) == expected).all()
    assert time.process_time() - started < 30


def test_what_is_all_alike_is_an_error(monkeypatch):
    monkeypatch.setattr("unicl_fast.packing.near_duplicates.MAX_PAIRS", 1000)
    hashes = np.array([number ^ (number >> 1) for number in range(60)], np.uint64)
    with pytest.raises(ValueError, match="choose a smaller distance"):
        find_leaders(hashes, 6)


def encoded(image: Image.Image, quality: int = 80) -> bytes:
    return saved(image, format="JPEG", quality=quality)


def hash_of(data: bytes) -> int:
    return int(np.frombuffer(look_at(data), LOOK)["hash"][0])


def test_hashes_do_not_depend_on_how_a_machine_rounds():
    """In floating point all but the first of these coefficients are noise."""
    flat = [Image.new("L", (64, 48), level) for level in (9, 120, 255)]
    assert {hash_of(encoded(image)) for image in flat} == {1 << 63}


def distances_of_copies(path: Path) -> tuple[int, dict[str, int]]:
    """The hash of a photograph, and in how many bits those of its copies differ from it."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    x, y = width // 40, height // 40
    copies = {
        "JPEG at quality 20": encoded(image, quality=20),
        "half the size": encoded(image.resize((width // 2, height // 2))),
        "twice the size": encoded(image.resize((width * 2, height * 2))),
        "grey": encoded(image.convert("L")),
        "a tenth higher": encoded(image.resize((width, int(height * 1.1)))),
        "a fifth brighter": encoded(image.point(lambda level: min(255, int(level * 1.2)))),
        "a fortieth cut from each side": encoded(image.crop((x, y, width - x, height - y))),
        "mirrored": encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    }
    value = hash_of(path.read_bytes())
    with Image.open(path) as drafted:
        drafted.draft("RGB", (128, 128))
        assert value == int(str(imagehash.phash(drafted)), 16)
    return value, {how: (hash_of(data) ^ value).bit_count() for how, data in copies.items()}


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_copies_of_photographs_are_within_4_bits_and_other_photographs_are_not(
    shared_data, capsys, count
):
    """With 200 it prints the table of docs/data.md."""
    paths = sorted((shared_data / "captions" / "flickr8k" / "images").iterdir())[:count]
    found = [distances_of_copies(path) for path in paths]
    hashes = np.array([value for value, _ in found], np.uint64)
    between = count_bits(hashes[:, None] ^ hashes[None])[np.triu_indices(count, 1)]
    distances = {how: np.array([each[how] for _, each in found]) for how in found[0][1]}
    with capsys.disabled():
        for how, values in distances.items() if count == 200 else ():
            shares = " / ".join(f"{100 * np.mean(values <= limit):.0f} %" for limit in (2, 4, 8))
            print(f"\n{how}: within 2 / 4 / 8 bits: {shares}", end="")
    for how in ("JPEG at quality 20", "half the size", "twice the size", "grey", "a tenth higher"):
        assert max(distances[how]) <= 4
    assert min(distances["mirrored"]) > 8
    assert between.min() > 10
