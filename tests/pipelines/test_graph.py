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

import dataclasses
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import numba
import numpy as np
import pytest
import torch
from nvidia.dali.plugin.numba import NumbaFunction
from open_clip.transform import PreprocessCfg, image_transform_v2
from packed_sets import Sample, pack
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional

from unicl_fast.config import DataConfig, Interpolation, Resample, TrainConfig
from unicl_fast.conversion import preprocessing
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.inference import Model
from unicl_fast.images.codec import encode_png
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.evaluation_loader import EvaluationLoader
from unicl_fast.pipelines.graph import Pipeline, build_evaluation_graph, build_train_graph
from unicl_fast.pipelines.host_batches import HostBatch
from unicl_fast.pipelines.kernels.operators import resample_operator
from unicl_fast.pipelines.plan.crop import evaluation_regions, random_windows
from unicl_fast.pipelines.running import Pace, decode
from unicl_fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.dali

SIZE = 96
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


def train_images(dataset: PackedDataset, *, device: str = "cpu", **data: Any) -> torch.Tensor:
    encoded = [dataset.image_bytes(index) for index in range(len(dataset))]
    inputs = (encoded, *windows_of(dataset), alternate_flips(len(dataset)))
    settings = DataConfig(image_size=SIZE, evaluation_resize=SIZE, **data)
    return decoded(partial(build_train_graph, data=settings), inputs, device)


def decoded(
    build: Callable[..., Pipeline], inputs: tuple[Any, ...], device: str = "cpu"
) -> torch.Tensor:
    """The images of a batch as a graph makes them."""
    batches = (HostBatch(inputs=one, metadata="all") for one in [inputs])
    place, pace = torch.device(device), Pace(threads=(2,), ahead=1)
    build = partial(build, device=place)
    images, _ = next(decode(build, batches, batch_size=len(inputs[0]), device=place, pace=pace))
    return images.cpu()


def evaluation_images(
    dataset: PackedDataset, data: DataConfig, *, device: str = "cpu", **changes: Any
) -> torch.Tensor:
    encoded = [dataset.image_bytes(index) for index in range(len(dataset))]
    regions = evaluation_regions(dataset.samples["height"], dataset.samples["width"], data)
    data = dataclasses.replace(data, **changes)
    return decoded(partial(build_evaluation_graph, data=data), (encoded, *regions), device)


def differences(ours: torch.Tensor, twin: np.ndarray) -> np.ndarray:
    assert ours.dtype == torch.uint8
    assert tuple(ours.shape) == twin.shape
    return np.abs(ours.numpy().astype(int) - twin)


def assert_equal_to_rounding(gap: np.ndarray, resample: Resample) -> None:
    assert gap.mean() < 0.25
    assert gap[:, 1:-1, 1:-1].max() <= 1
    assert gap.max() <= (1 if resample == "fused" else 20)


def train_twin(dataset: PackedDataset, interpolation: Interpolation = "bilinear") -> np.ndarray:
    """What torchvision's transforms.v2 makes of the same windows as uint8 tensors."""
    starts, shapes = windows_of(dataset)
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


both_resamplers = pytest.mark.parametrize("resample", ["fused", "dali"])


@both_resamplers
@pytest.mark.parametrize("kind", ["labelled", "captioned"])
def test_train_images_equal_torchvision_s(kind, resample, request):
    dataset = request.getfixturevalue(kind)
    gap = differences(train_images(dataset, resample=resample), train_twin(dataset))
    assert_equal_to_rounding(gap, resample)
    if resample == "fused":
        ours = train_images(dataset, interpolation="bicubic")
        gap = differences(ours, train_twin(dataset, "bicubic"))
        assert gap.max() <= 1
        assert gap.mean() < 0.01


@both_resamplers
def test_decoding_a_window_equals_cutting_the_decoded_image(captioned, resample):
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
    inputs = encoded, starts, shapes, np.zeros((count, 1), dtype=np.int32)
    data = DataConfig(image_size=side, evaluation_resize=side, resample=resample)
    images = decoded(partial(build_train_graph, data=data), inputs)
    whole = [np.asarray(open_image(captioned, index)) for index in chosen.tolist()]
    twin = np.stack([image[9 : 9 + side, 5 : 5 + side] for image in whole])
    assert differences(images, twin).max() == 0


@both_resamplers
@pytest.mark.parametrize(
    ("kind", "resize", "crop"), [("labelled", 256, 224), ("captioned", 37, 32)]
)
def test_evaluation_images_equal_torchvision_s_resize_and_centre_crop(
    kind, resize, crop, resample, request
):
    dataset = request.getfixturevalue(kind)
    data = DataConfig(image_size=crop, evaluation_resize=resize)
    reference = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])
    twin = np.stack(
        [np.asarray(reference(open_image(dataset, index))) for index in range(len(dataset))]
    )
    gap = differences(evaluation_images(dataset, data, resample=resample), twin)
    assert_equal_to_rounding(gap, resample)


SIDES = ((60, 80), (80, 60), (47, 1000), (1000, 46), (32, 32), (5, 3), (300, 299), (1, 300))


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedDataset]:
    """Images of all shapes, whose pixels are noise."""
    random = np.random.default_rng(0)
    samples = []
    for height, width in SIDES:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        samples.append(Sample(encode_png(pixels), captions=["noise"]))
    folder = tmp_path_factory.mktemp("packed") / "oblong"
    with pack(folder, samples, class_names=(), tokenizer=Tokenizer()) as dataset:
        yield dataset


@both_resamplers
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["longest", "squash"])
def test_whole_images_are_shown_as_open_clip_shows_them(
    oblong, mode, interpolation,
    resample,
):  # fmt: skip
    """In evaluation and, by the same kernel, where a model is used on images."""
    data = DataConfig(
        image_size=32, evaluation_resize=mode, interpolation=interpolation, resample=resample
    )
    cfg = PreprocessCfg(size=32, **preprocessing.for_open_clip(data))
    transform = image_transform_v2(cfg, is_train=False).transforms[:-3]  # to pixels
    (shown,) = EvaluationLoader(oblong, data, batch_size=len(SIDES))
    encoders = Mock(spec=UniCL)
    encoders.eval.return_value.config = TrainConfig(data=data)
    user = Model(encoders)
    for index, image in zip(shown.sample_ids.tolist(), shown.images.numpy(), strict=True):
        whole = np.array(open_image(oblong, index))
        prepared = user.prepare(whole)
        gap = np.abs(prepared.astype(int) - image)
        assert gap.mean() <= (3 if resample == "dali" else 0), whole.shape
        if whole.shape[0] == 1 and mode == "longest":
            continue  # which is no pixel high, to open_clip
        twin = Image.fromarray(whole)
        for step in transform:
            twin = step(twin)
        gap = np.abs(prepared.astype(int) - np.asarray(twin))
        assert gap.max() <= (1 if interpolation == "bilinear" else 14), whole.shape
        assert gap.mean() < 0.3


def test_both_graphs_refuse_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for build in (build_train_graph, build_evaluation_graph):
        with pytest.raises(RuntimeError, match=r"no usable CUDA driver.*run\.device=cpu"):
            build(lambda: (), data=DataConfig(), batch_size=1, device=torch.device("cuda", 0))


@pytest.mark.parametrize("method", ["_run_fn_sig", "_setup_fn_sig"])
def test_a_dali_that_calls_functions_in_another_way_is_refused(monkeypatch, method):
    resample_operator(32, "bilinear")
    monkeypatch.setattr(NumbaFunction, method, lambda *_: numba.types.void(numba.types.int32))
    with pytest.raises(RuntimeError, match=r"from 2\.2 to 2\.4.*data\.resample=dali"):
        resample_operator(32, "bilinear")


@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_gpu_images_equal_the_cpu_s(labelled, hw_decoder_load, monkeypatch):
    """On a GPU the decoder's transform is rounded in another way; the resize is DALI's on both.

    Chroma of the nearest pixel, DALI's default, makes a mean of 0.65, and 6.2 for a pixel in a
    hundred.
    """
    monkeypatch.setattr("unicl_fast.pipelines.graph.HW_DECODER_LOAD", hw_decoder_load)
    data = DataConfig(resample="dali")
    for gap in (
        differences(
            train_images(labelled, device="cuda"), train_images(labelled, resample="dali").numpy()
        ),
        differences(
            evaluation_images(labelled, data, device="cuda"),
            evaluation_images(labelled, data, resample="dali").numpy(),
        ),
    ):
        assert gap.mean() < 0.5
        assert np.quantile(gap, 0.99) <= 2
