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
from unicl_fast.pipelines.graph import build_train_graph

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


@pytest.mark.parametrize("resample", ["fused", pytest.param("dali", marks=pytest.mark.long)])
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
