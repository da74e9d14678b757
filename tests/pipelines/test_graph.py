"""DALI's images against a plain decode with Pillow, on real files.

What is known to differ, and by how much (levels of 255; the limits below are these, rounded up):

* Decoding is equal to the last bit: both use libjpeg-turbo's default transform and upsampling, and
  a window is decoded with its neighbours' chroma in view.
* Pillow resamples columns, rounds to whole levels, then resamples rows; DALI and the fused operator
  round once. That moves every sixth value by one level: mean difference 0.17, largest 1.
* At the border of a crop, DALI repeats the last pixel where the filter reaches beyond it; Pillow
  and the fused operator leave the outside out and let the rest weigh more. An eighth of a
  triangular filter lies outside there, so that an outermost row or column of DALI's may differ by
  an eighth of the contrast: seen up to 16.
* Bicubic overshoots at edges; Pillow and torchvision clip to 0..255 between their two passes, and
  the fused operator does so too, in torchvision's arithmetic. Pillow 13 takes some images' rows
  first: at hard edges the order makes up to 14 levels. With DALI's resize, the border's effect is
  larger.
* A window one pixel wide of an image with halved chroma: libjpeg-turbo interpolates chroma only
  in wider ones. Up to 5 levels, in windows that no crop law makes of an image of any size.
"""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from functools import partial

import numba
import numpy as np
import pytest
import torch
from nvidia.dali.plugin.numba import NumbaFunction
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms.v2 import functional

from unicl_fast.config import DataConfig, Interpolation, Resample
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.pipelines.feed.host_batches import HostBatch
from unicl_fast.pipelines.graph import (
    build_evaluation_graph,
    build_train_graph,
    run_graphs,
    split_threads,
)
from unicl_fast.pipelines.kernels.operators import resample_operator
from unicl_fast.pipelines.kernels.resample import resample_region
from unicl_fast.pipelines.plan.crop import central_windows, random_windows

pytestmark = pytest.mark.dali

SIZE = 96
PILLOW_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


Windows = tuple[np.ndarray, np.ndarray]


def windows_of(dataset: PackedDataset) -> Windows:
    return random_windows(
        dataset.samples["height"],
        dataset.samples["width"],
        np.arange(len(dataset)),
        key=11,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
    )


def alternate_flips(count: int) -> np.ndarray:
    return (np.arange(count) % 2).astype(np.int32)[:, None]


def open_image(dataset: PackedDataset, index: int) -> Image.Image:
    return Image.open(io.BytesIO(dataset.image_bytes(index).tobytes())).convert("RGB")


def train_images(
    dataset: PackedDataset,
    *,
    image_size: int = SIZE,
    interpolation: Interpolation = "bilinear",
    resample: Resample = "fused",
    device: str = "cpu",
) -> torch.Tensor:
    starts, shapes = windows_of(dataset)
    count = len(dataset)
    encoded = [dataset.image_bytes(index) for index in range(count)]
    integers = np.arange(3 * count).reshape(count, 3)
    batch = HostBatch(
        inputs=(encoded, starts, shapes, alternate_flips(count), integers), metadata="all"
    )
    build = partial(
        build_train_graph,
        data=DataConfig(
            image_size=image_size,
            evaluation_resize=image_size,
            interpolation=interpolation,
            resample=resample,
            threads=2,
            prefetch=1,
        ),
        batch_size=count,
        device=torch.device(device),
    )
    ((images, carried), _) = next(
        run_graphs([build], iter([batch]), device=torch.device(device), ahead=1)
    )
    assert np.array_equal(carried.cpu().numpy(), integers)
    return images.cpu()


def train_twin(
    dataset: PackedDataset, *, image_size: int = SIZE, interpolation: str = "bilinear"
) -> np.ndarray:
    starts, shapes = windows_of(dataset)
    flips = alternate_flips(len(dataset))
    images = []
    for index in range(len(dataset)):
        (top, left), (height, width) = starts[index].tolist(), shapes[index].tolist()
        image = open_image(dataset, index).crop((left, top, left + width, top + height))
        image = image.resize((image_size, image_size), PILLOW_FILTERS[interpolation])
        images.append(np.asarray(ImageOps.mirror(image) if flips[index] else image))
    return np.stack(images)


def evaluation_images(
    dataset: PackedDataset,
    data: DataConfig,
    *,
    interpolation: Interpolation = "bilinear",
    resample: Resample = "fused",
    device: str = "cpu",
) -> torch.Tensor:
    encoded = [dataset.image_bytes(index) for index in range(len(dataset))]
    regions = central_windows(
        dataset.samples["height"],
        dataset.samples["width"],
        resize=data.evaluation_resize,
        crop=data.image_size,
    )
    build = partial(
        build_evaluation_graph,
        data=dataclasses.replace(
            data, interpolation=interpolation, resample=resample, threads=2, prefetch=1
        ),
        batch_size=len(dataset),
        device=torch.device(device),
    )
    batch = HostBatch(inputs=(encoded, *regions), metadata="all")
    ((images,), _) = next(run_graphs([build], iter([batch]), device=torch.device(device), ahead=1))
    return images.cpu()


def differences(ours: torch.Tensor, twin: np.ndarray) -> np.ndarray:
    assert ours.dtype == torch.uint8
    assert tuple(ours.shape) == twin.shape
    return np.abs(ours.numpy().astype(int) - twin)


def assert_equal_to_rounding(gap: np.ndarray, resample: Resample) -> None:
    assert gap.mean() < 0.25
    assert gap[:, 1:-1, 1:-1].max() <= 1
    assert gap.max() <= (1 if resample == "fused" else 20)


def torchvision_twin(
    dataset: PackedDataset, windows: Windows, interpolation: Interpolation
) -> np.ndarray:
    """What transforms.v2 makes of the same windows as uint8 tensors."""
    starts, shapes = windows
    flips = alternate_flips(len(dataset))
    images = []
    for index in range(len(dataset)):
        whole = torch.from_numpy(np.array(open_image(dataset, index))).permute(2, 0, 1)
        square = functional.resized_crop(
            whole,
            *starts[index].tolist(),
            *shapes[index].tolist(),
            size=[SIZE, SIZE],
            interpolation=transforms.InterpolationMode(interpolation),
            antialias=True,
        )
        images.append(square.flip(2) if flips[index] else square)
    return torch.stack(images).permute(0, 2, 3, 1).numpy()


def smallest_windows(dataset: PackedDataset) -> Windows:
    """Single pixels, and lines of one pixel's width, at corners and in the middle."""
    sizes = np.stack([dataset.samples["height"], dataset.samples["width"]], axis=1).astype(np.int32)
    kinds = np.arange(len(dataset)) % 3
    shapes = np.ones_like(sizes)
    shapes[kinds == 1, 0] = sizes[kinds == 1, 0]
    shapes[kinds == 2, 1] = sizes[kinds == 2, 1]
    positions = (np.arange(len(dataset)) % 5)[:, None] / 4
    return ((sizes - shapes) * positions).astype(np.int32), shapes


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["labelled", "captioned"])
def test_real_crops_are_torchvision_s_to_one_level(
    kind: str, interpolation: Interpolation, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)
    ours = train_images(dataset, interpolation=interpolation)
    gap = differences(ours, torchvision_twin(dataset, windows_of(dataset), interpolation))
    assert gap.max() <= 1
    assert gap.mean() < (0.25 if interpolation == "bilinear" else 0.01)


@pytest.mark.parametrize(
    "interpolation", [pytest.param("bilinear", marks=pytest.mark.slow), "bicubic"]
)
def test_windows_of_one_pixel_are_torchvision_s_to_one_level(
    captioned: PackedDataset, interpolation: Interpolation
) -> None:
    """Cut out of decoded images: the decoder's part is told at the top."""
    starts, shapes = windows = smallest_windows(captioned)
    crops = np.empty((len(captioned), SIZE, SIZE, 3), np.uint8)
    for index, flip in enumerate(alternate_flips(len(captioned))[:, 0]):
        (top, left), (height, width) = starts[index].tolist(), shapes[index].tolist()
        whole = np.asarray(open_image(captioned, index))
        crop = np.ascontiguousarray(whole[top : top + height, left : left + width])
        edges = (0.0, float(height), 0.0, float(width))
        resample_region(crops[index], crop, *edges, bool(flip), interpolation == "bicubic")
    twin = torchvision_twin(captioned, windows, interpolation)
    assert differences(torch.from_numpy(crops), twin).max() <= 1


both_resamplers = pytest.mark.parametrize("resample", ["fused", "dali"])


@both_resamplers
@pytest.mark.parametrize("kind", ["labelled", "captioned"])
def test_train_images_equal_pillow_s(
    kind: str, resample: Resample, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)
    gap = differences(train_images(dataset, resample=resample), train_twin(dataset))
    assert_equal_to_rounding(gap, resample)


@both_resamplers
def test_decoding_a_window_equals_cutting_the_decoded_image(
    captioned: PackedDataset, resample: Resample
) -> None:
    """Without resampling nothing may differ, at the window's edge either (4:2:0 chroma)."""
    side = 64
    chosen = np.flatnonzero(
        (captioned.samples["height"] >= side + 9) & (captioned.samples["width"] >= side + 5)
    )
    assert len(chosen) > 30
    count = len(chosen)
    encoded = [captioned.image_bytes(index) for index in chosen.tolist()]
    starts = np.tile(np.array([9, 5], dtype=np.int32), (count, 1))
    shapes = np.full((count, 2), side, dtype=np.int32)
    integers = np.zeros((count, 1), dtype=np.int64)
    batch = HostBatch(
        inputs=(encoded, starts, shapes, np.zeros((count, 1), dtype=np.int32), integers),
        metadata="",
    )
    cpu = torch.device("cpu")
    build = partial(
        build_train_graph,
        data=DataConfig(
            image_size=side, evaluation_resize=side, resample=resample, threads=2, prefetch=1
        ),
        batch_size=count,
        device=cpu,
    )
    ((images, _), _) = next(run_graphs([build], iter([batch]), device=cpu, ahead=1))
    whole = [np.asarray(open_image(captioned, index)) for index in chosen.tolist()]
    twin = np.stack([image[9 : 9 + side, 5 : 5 + side] for image in whole])
    assert differences(images, twin).max() == 0


@both_resamplers
def test_bicubic_train_images_equal_pillow_s(labelled: PackedDataset, resample: Resample) -> None:
    gap = differences(
        train_images(labelled, interpolation="bicubic", resample=resample),
        train_twin(labelled, interpolation="bicubic"),
    )
    assert gap.mean() < 0.25
    assert np.quantile(gap, 0.995) <= 1
    assert gap.max() <= 20


def test_grey_images_and_png_come_out_as_rgb(labelled: PackedDataset) -> None:
    images = train_images(labelled)
    is_grey = [(image == image[..., :1]).all().item() for image in images]
    assert all(is_grey[:9])
    assert sum(is_grey) < 20
    png = len(labelled) - 1
    assert bytes(labelled.image_bytes(png)[:4]) == b"\x89PNG"
    assert np.abs(images[png].numpy().astype(int) - train_twin(labelled)[png]).mean() < 0.25


@both_resamplers
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (224, 224), (37, 32)])
@pytest.mark.parametrize("kind", ["labelled", "captioned"])
def test_evaluation_images_equal_torchvision_s_resize_and_centre_crop(
    kind: str, resize: int, crop: int, resample: Resample, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)
    data = DataConfig(image_size=crop, evaluation_resize=resize)
    reference = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])
    twin = np.stack(
        [np.asarray(reference(open_image(dataset, index))) for index in range(len(dataset))]
    )
    gap = differences(evaluation_images(dataset, data, resample=resample), twin)
    assert_equal_to_rounding(gap, resample)


def test_both_graphs_refuse_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for build in (build_train_graph, build_evaluation_graph):
        with pytest.raises(RuntimeError, match=r"no usable CUDA driver.*run\.device=cpu"):
            build(lambda: (), data=DataConfig(), batch_size=1, device=torch.device("cuda", 0))


@pytest.mark.parametrize("method", ["_run_fn_sig", "_setup_fn_sig"])
def test_a_dali_that_calls_functions_in_another_way_is_refused(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    resample_operator(32, "bilinear")
    monkeypatch.setattr(NumbaFunction, method, lambda *_: numba.types.void(numba.types.int32))
    with pytest.raises(RuntimeError, match=r"from 2\.2 to 2\.4.*data\.resample=dali"):
        resample_operator(32, "bilinear")


def test_without_dali_the_message_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "import unicl_fast.pipelines.plan.plan\n"  # needs no DALI
        "import unicl_fast.pipelines.loader"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ModuleNotFoundError")
    assert "pip install 'unicl_fast[cuda12]'" in last_line


@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_gpu_images_equal_the_cpu_s(
    labelled: PackedDataset, hw_decoder_load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the decoder's transform is rounded in another way; the resize is DALI's on both.

    Chroma of the nearest pixel, DALI's default, makes a mean of 0.65, and 6.2 for a pixel in a
    hundred.
    """
    monkeypatch.setattr("unicl_fast.pipelines.graph.HW_DECODER_LOAD", hw_decoder_load)
    data = DataConfig(resample="dali")
    for gap in (
        differences(
            train_images(labelled, device="cuda"),
            train_images(labelled, resample="dali").numpy(),
        ),
        differences(
            evaluation_images(labelled, data, device="cuda"),
            evaluation_images(labelled, data, resample="dali").numpy(),
        ),
    ):
        assert gap.mean() < 0.5
        assert np.quantile(gap, 0.99) <= 2


def test_threads_are_shared_out_where_graphs_can_take_turns() -> None:
    cpu = torch.device("cpu")
    data = DataConfig(threads=5)
    assert [part.threads for part in split_threads(data, cpu)] == [3, 2]
    one_thread, nothing_ahead = DataConfig(threads=1), DataConfig(threads=5, prefetch=1)
    assert split_threads(one_thread, cpu) == [one_thread]
    assert split_threads(nothing_ahead, cpu) == [nothing_ahead]
    assert split_threads(data, torch.device("cuda")) == [data]
