"""The fused resampling kernel against an oracle in fp64; test_graph.py has torchvision's."""

import llvmlite.binding
import numpy as np
import pytest
from children import run_python
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples

from unicl_fast.pipelines.kernels.resample import resample_region

sides = st.integers(1, 70)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resampled(
    image: np.ndarray,
    size: int,
    *,
    region: tuple[float, float, float, float] | None = None,
    flip: bool = False,
    cubic: bool = False,
) -> np.ndarray:
    """The kernel's crop, and a check that it wrote nothing around it."""
    guard = 64
    memory = np.full(2 * guard + size * size * 3, 77, np.uint8)
    crop = memory[guard:-guard].reshape(size, size, 3)
    top, bottom, left, right = region or (0, image.shape[0], 0, image.shape[1])
    resample_region(crop, image, float(top), float(bottom), float(left), float(right), flip, cubic)
    assert (memory[:guard] == 77).all()
    assert (memory[-guard:] == 77).all()
    return crop


def oracle_weights(length: int, start: float, end: float, size: int, *, cubic: bool) -> np.ndarray:
    """Pillow's law as a matrix [size length]."""
    scale = (end - start) / size
    widened = max(scale, 1.0)
    centers = start + (np.arange(size) + 0.5) * scale
    x = np.abs(np.arange(length) + 0.5 - centers[:, None]) / widened
    if cubic:
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    else:
        weights = np.maximum(1 - x, 0)
    # Pillow takes whole pixels: those whose centre is within the filter, to the rounding
    reach = widened * (2 if cubic else 1)
    first = np.maximum((centers - reach + 0.5).astype(int), 0)
    last = np.minimum((centers + reach + 0.5).astype(int), length)
    position = np.arange(length)
    inside = (position >= first[:, None]) & (position < last[:, None])
    weights = np.where(inside, weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def oracle(image: np.ndarray, size: int, *region: float, cubic: bool = False) -> np.ndarray:
    """The region (top, bottom, left, right) as fp64, of cubic's first pass in whole levels."""
    vertical = oracle_weights(image.shape[0], *region[:2], size, cubic=cubic)
    horizontal = oracle_weights(image.shape[1], *region[2:], size, cubic=cubic)
    narrow = np.einsum("hwc,xw->hxc", image.astype(np.float64), horizontal)
    if cubic:
        narrow = np.floor(narrow + 0.5).clip(0, 255)
    return np.einsum("yh,hxc->yxc", vertical, narrow).clip(0, 255)


@given(
    height=sides,
    width=sides,
    size=st.integers(1, 40),
    flip=st.booleans(),
    cubic=st.booleans(),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@examples(400)
def test_any_region_equals_the_oracle(height, width, size, flip, cubic, seed, data):
    """Bilinear is rounded once, cubic after each of its passes, as in torchvision.

    Bilinear has a line with 7 places behind the point, and weights with 14 or more: together a
    twentieth of a level. Cubic's weights of 16 bits may move values of the first pass over the edge
    of their rounding, and the second weighs such levels with 1.25 at most, all together.
    """
    image = random_image(height, width, seed)
    region = []
    for length in (height, width):
        start = data.draw(st.floats(0, length - 1))
        region += [start, data.draw(st.floats(min(start + 1, length), length))]
    crop = resampled(image, size, region=tuple(region), flip=flip, cubic=cubic)
    exact = oracle(image, size, *region, cubic=cubic)
    if flip:
        exact = exact[:, ::-1]
    assert np.abs(crop - exact).max() < (1.75 if cubic else 0.55)


_SUM_OF_SQUARES = """
import zlib
import numpy as np
from unicl_fast.pipelines.kernels.resample import resample_region
total = 0
for height, width, size in ((1, 1, 9), (30, 7, 12), (90, 120, 56), (200, 190, 56), (500, 333, 40)):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for cubic in (False, True):
        crop = np.empty((size, size, 3), np.uint8)
        resample_region(crop, image, 0.0, float(height), 0.0, float(width), cubic, cubic)
        total = zlib.crc32(crop, total)
print(total)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not llvmlite.binding.get_host_cpu_features().get("avx512bw"),
    reason="needs a processor with AVX-512: only then three kinds of code can be compared",
)
def test_all_processors_make_the_same_pixels():
    """With AVX2 alone, and with what every processor has, other instructions multiply."""
    sums = []
    features = "+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma"
    for chosen in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features},
                   {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):  # fmt: skip
        sums.append(int(run_python("-c", _SUM_OF_SQUARES, **chosen)))
    assert sums == [sums[0]] * 3


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(1, 1, 9), (300, 333, 224), (4096, 8, 16), (9, 8192, 32), (16704, 9, 32), (8, 16704, 1)],
)
def test_an_even_image_stays_as_it_is(height, width, size, level):
    """However many taps: rounding, each by little, must not come to a level, or leave 16 bits."""
    image = np.full((height, width, 3), level, np.uint8)
    for cubic in (False, True):
        assert (resampled(image, size, cubic=cubic) == level).all()


@pytest.mark.parametrize(("height", "width", "size"), [(4096, 60, 16), (60, 4096, 16), (900, 9, 8)])
def test_much_shrunk_images_are_off_by_less_than_a_level(height, width, size):
    image = random_image(height, width)
    image[:, : width // 2] //= 8  # dark, where nothing is lost of products and all that is added
    gap = resampled(image, size) - oracle(image, size, 0, height, 0, width)
    assert np.abs(gap).max() < 1


def test_a_crop_of_its_own_size_is_copied():
    image = random_image(28, 28)
    assert np.array_equal(resampled(image, 28), image)
    assert np.array_equal(resampled(image, 28, flip=True), image[:, ::-1])
    assert np.array_equal(resampled(image, 28, cubic=True), image)
