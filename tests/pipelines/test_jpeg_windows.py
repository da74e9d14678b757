"""A JPEG cut down to its window's part gives the same pixels; what cannot be cut stays as it is."""

import io
from typing import Any

import numpy as np
import pytest
from children import run_python
from hypothesis import given
from hypothesis import strategies as st
from packed_sets import saved
from PIL import Image
from property_tests import examples

from unicl_fast.images.codec import encode_jpeg, restart_interval
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.pipelines.kernels.jpeg_windows import cut_to_windows

SUBSAMPLINGS = ("420", "422", "444", "grey")


def array_of(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(data, dtype=np.uint8).copy()


def decoded(data: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data.tobytes())))


def noise(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth enough to be like an image, with every block and colour different."""
    generator = np.random.default_rng(height * 1000 + width)
    small = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray[Any, Any], subsampling: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if subsampling == "grey":
        return array_of(encode_jpeg(pixels[:, :, :1], quality=90, subsampling="420"))
    return array_of(encode_jpeg(pixels, quality=90, subsampling=subsampling))


def with_marker_at_each_block(
    pixels: np.ndarray[Any, Any], subsampling: str
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """More of them than packing sets; files of others have such."""
    how = {"subsampling": ":".join(subsampling), "restart_marker_blocks": 1}
    return array_of(saved(Image.fromarray(pixels), format="JPEG", **how))


def cut_one(
    data: np.ndarray[Any, Any], start: tuple[int, int], shape: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
    (cut,), places = cut_to_windows(EncodedImages.of([data]), np.int32([start]), np.int32([shape]))
    whole = data if np.array_equal(cut, data) else cut
    return whole, (int(places[0, 0]), int(places[0, 1]))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@given(values=st.data())
@examples(40)
def test_windows_of_any_image_have_the_same_pixels(subsampling, values):
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
    assert cut[-2:].tolist() == [0xFF, 0xD9]
    if rows <= height // 4:
        assert len(cut) < 0.75 * len(whole)


@pytest.mark.parametrize("subsampling", ["420", "422"])
@pytest.mark.parametrize("width", [131, 132])
def test_a_last_segment_of_a_few_pixels_is_interpolated_as_in_the_whole(subsampling, width):
    """Alone it would be so narrow that libjpeg repeats its colours."""
    whole = with_marker_at_each_block(noise(140, width), subsampling)
    for columns in (1, 2):
        cut, (row, column) = cut_one(whole, (30, width - columns), (20, columns))
        assert cut is not whole
        np.testing.assert_array_equal(
            decoded(cut)[row : row + 20, column : column + columns],
            decoded(whole)[30:50, width - columns :],
        )


def test_what_has_no_markers_to_cut_at_stays_the_same():
    image = Image.fromarray(noise(200, 200))
    options = (
        {"format": "JPEG"},
        {"format": "JPEG", "progressive": True, "restart_marker_rows": 1},
        {"format": "JPEG", "restart_marker_blocks": 5},  # rows of 13 do not begin with one
        {"format": "PNG"},
        {"format": "WEBP"},
    )
    contents = [*(saved(image, **one) for one in options), b"", b"\xff\xd8\xff"]
    files = [*map(array_of, contents)]
    starts = np.full((len(files), 2), 8, np.int32)
    cut, places = cut_to_windows(EncodedImages.of(files), starts, np.full_like(starts, 30))
    assert all(map(np.array_equal, cut, files))
    assert (places == starts).all()


def _segment(data: np.ndarray[Any, Any], marker: int) -> int:
    return data.tobytes().index(bytes([0xFF, marker]))


def _restart_markers(data: np.ndarray[Any, Any]) -> list[int]:
    """Where they are in the codes; in these headers nothing looks like one."""
    scan = _segment(data, 0xDA)
    return [
        place
        for place in range(scan, len(data) - 1)
        if data[place] == 0xFF and 0xD0 <= data[place + 1] <= 0xD7
    ]


HEADERS = (
    (0xC0, 4, 12),  # bits a sample
    (0xC0, 9, 2),  # components
    (0xC0, 1, 0xC2),  # progressive
    (0xC0, 1, 0xC9),  # arithmetic codes
    (0xDD, 5, 0),  # no restart interval
    (0xDA, 4, 1),  # the first scan is of one component
    (0xDB, 1, 0xD8),  # a second image begins
    (0xDB, 1, 0xD9),  # the end
)


def test_what_is_no_plain_jpeg_is_left_to_the_decoder():
    """Above all, a file that ends early must not become a shorter one that is sound."""
    whole = encoded(noise(200, 200), "420")
    window = (150, 20), (50, 30)
    assert cut_one(whole, *window)[0] is not whole
    left = [whole[:length] for length in range(0, len(whole) - 1, 97)]
    for marker, byte, value in HEADERS:
        left.append(whole.copy())
        left[-1][_segment(whole, marker) + byte] = value
    frame = _segment(whole, 0xC0)
    left.append(np.insert(whole, frame, whole[frame : frame + 19]))  # twice
    left.append(whole.copy())
    left[-1][-1] = 0xD0  # in the place of the end
    for number, data in enumerate(left):
        assert cut_one(data, *window)[0] is data, number
    for start, shape in (((-1, 0), (10, 10)), ((0, 195), (10, 10)), ((5, 5), (0, 5))):
        assert cut_one(whole, start, shape)[0] is whole, start  # not in the image


def test_markers_out_of_turn_are_left_to_the_decoder():
    # one segment a row of 16 pixels, as 13 is prime; with the margin the window needs seven of them
    whole, window = encoded(noise(200, 200), "420"), ((50, 20), (50, 30))
    assert cut_one(whole, *window)[0] is not whole
    third, last = _restart_markers(whole)[2], _restart_markers(whole)[6]
    changed = [np.delete(whole, [third, third + 1])]
    changed.append(np.insert(whole, third, whole[third : third + 2]))  # twice
    for place, value in ((third, 0xD5), (third, 0xD9), (last, 0xD7)):
        changed.append(whole.copy())
        changed[-1][place + 1] = value
    for number, data in enumerate(changed):
        assert cut_one(data, *window)[0] is data, number


def test_fill_bytes_before_a_marker_are_passed_over():
    plain = encoded(noise(200, 200), "420")
    place = _segment(plain, 0xDB)
    filled = np.insert(plain, place, [0xFF] * 3)
    cut, (row, column) = cut_one(filled, (150, 20), (50, 30))
    assert cut is not filled
    np.testing.assert_array_equal(
        decoded(cut)[row : row + 50, column : column + 30], decoded(plain)[150:200, 20:50]
    )


FUZZ = """
import numpy as np, sys
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.pipelines.kernels.jpeg_windows import cut_to_windows

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
    (cut,), places = cut_to_windows(EncodedImages.of([data]), start, shape)
    assert len(cut) <= len(data) and (places <= start).all() and (places >= 0).all()
    num_cut += len(cut) != len(data)
print(num_cut)
"""


@pytest.mark.slow
def test_damaged_files_lead_nowhere_else(tmp_path):
    """With every index checked, which compiled code does not do by itself.

    Nor here where it looks for 0xFF in 64 bytes at once.
    """
    np.save(tmp_path / "whole.npy", encoded(noise(200, 200), "420"))
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert 300 < int(run_python("-c", FUZZ, tmp_path / "whole.npy", **checked)) < 2700


@pytest.mark.parametrize(
    ("height", "width", "block_width", "expected"),
    [
        (384, 256, 16, 2),  # 16 blocks
        (256, 384, 16, 3),  # 24
        (256, 272, 16, 17),  # 17, a prime: one segment
        (128, 144, 16, 3),  # 9
        (128, 128, 16, 2),  # 8, which would make segments of 16 pixels
        (256, 256, 8, 4),  # 32
        (127, 400, 16, 0),
    ],
)
def test_segments_are_some_eight_a_row_and_not_short(height, width, block_width, expected):
    assert restart_interval(height, width, block_width=block_width) == expected
