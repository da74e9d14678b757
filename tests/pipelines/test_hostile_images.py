"""What packing accepts of the hostile files, DALI's graphs decode: all of it, in every window."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bombs import BOMBS, SOUND_BOMBS, honest
from PIL import Image

from unicl_fast.config import DataConfig, Resample
from unicl_fast.images.check import CheckedImage, ImageError, check_image
from unicl_fast.pipelines.graph import Pipeline, build_train_graph, decode_windows, fn

pytestmark = [pytest.mark.dali, pytest.mark.slow]

SIZE = 32
CPU = torch.device("cpu")


def settings(resample: Resample) -> DataConfig:
    return DataConfig(image_size=SIZE, evaluation_resize=SIZE, resample=resample)


@pytest.fixture(scope="module", params=["keep", pytest.param("webp", marks=pytest.mark.long)])
def accepted(shared_data: Path, request: pytest.FixtureRequest) -> dict[str, CheckedImage]:
    """Of the hostile set and of the bombs, everything that packing takes."""
    folder = shared_data / "hostile"
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        data = {row["file"]: (folder / row["file"]).read_bytes() for row in csv.DictReader(file)}
    data |= {name: make() for name, make in BOMBS.items()} | honest(40)
    taken = {}
    for name, content in data.items():
        try:
            taken[name] = check_image(content, max_pixels=50_000_000, format=request.param)
        except ImageError:
            continue
    too_wide = 1 if request.param == "webp" else 0
    assert len(taken) == 175 + len(SOUND_BOMBS) + len(honest(40)) - too_wide
    return taken


def corners(images: list[CheckedImage]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Starts and shapes of windows: the whole, and one pixel at the corners and in the middle."""
    sizes = np.array([[image.height, image.width] for image in images], np.int32)
    yield np.zeros_like(sizes), sizes
    one = np.ones_like(sizes)
    for place in (np.zeros_like(sizes), sizes // 2, sizes - 1):
        yield place, one
    yield np.stack([sizes[:, 0] - 1, np.zeros_like(sizes[:, 0])], axis=1), one


@pytest.mark.parametrize("resample", ["fused", "dali"])
def test_every_accepted_image_is_decoded_in_every_training_window(accepted, resample):
    pixels = list(accepted.values())
    encoded = [np.frombuffer(image.data, np.uint8) for image in pixels]
    windows = list(corners(pixels))
    flips = np.zeros((len(pixels), 1), np.int32)
    inputs = iter([(encoded, *window, flips) for window in windows])
    graph = build_train_graph(
        lambda: next(inputs), data=settings(resample), batch_size=len(pixels), device=CPU
    )
    for starts, shapes in windows:
        images = graph.run()[0]
        for place, (name, image) in enumerate(accepted.items()):
            pixels = images.at(place)
            assert pixels.shape == (SIZE, SIZE, 3), name
            if shapes[place].max() == 1:  # the very pixel, however far it is stretched
                y, x = starts[place]
                wanted = Image.open(io.BytesIO(image.data)).convert("RGB").getpixel((x, y))
                difference = np.abs(pixels.astype(int) - np.array(wanted)).max()
                assert difference <= (8 if image.extension == "jpg" else 0), name


@pytest.mark.parametrize("format", ["webp", "png"])
def test_windows_of_real_photographs_are_what_pillow_cuts_out(shared_data, format):
    """Not a level apart: both formats leave a decoder no choice, unlike JPEG."""
    paths = sorted((shared_data / "decode" / "images").iterdir())[::20]
    images = [check_image(path.read_bytes(), format=format, short_side=256) for path in paths]
    encoded = [np.frombuffer(image.data, np.uint8) for image in images]
    sizes = np.array([(image.height, image.width) for image in images], np.int32)
    random = np.random.default_rng(0)
    shapes = random.integers(1, sizes + 1).astype(np.int32)
    starts = random.integers(0, sizes - shapes + 1).astype(np.int32)
    pipeline = Pipeline(batch_size=len(paths), num_threads=2, device_id=None)
    with pipeline:
        inputs = fn.external_source(lambda: (encoded, starts, shapes), num_outputs=3, batch=True)
        pipeline.set_outputs(decode_windows(*inputs, device=CPU, form="files"))
    (windows,) = pipeline.run()
    for place, data in enumerate(encoded):
        whole = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
        (top, left), (height, width) = starts[place], shapes[place]
        expected = whole[top : top + height, left : left + width]
        assert np.array_equal(windows.at(place), expected), paths[place].name
