"""What augmentation does to pixels: both operators beside each other, and beside Pillow.

The fused operator and DALI's compute the same; one image in some thousands of values is a level
apart where both round. What is known to differ from Pillow (levels of 255):

* warps: Pillow shows the fill colour wherever a pixel's centre lies outside, and repeats the edge
  just inside it; DALI blends with the fill colour over one pixel. Away from there at most 1.
* Brightness, contrast, sharpness: Pillow cuts fractions off where the others round: 1. Colour: 2,
  since grey is rounded there first. Pillow leaves the outermost pixels unsharpened.
* Equalising: another formula for the same histogram, OpenCV's: 3 in the mean at 112 pixels.
* Jitter: contrast turns about mid-grey (128) where torchvision takes the image's mean, and hue in
  YIQ where torchvision takes HSV; brightness, saturation and grey are torchvision's to 2 levels.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional

from unicl_fast.augmentation import parse_augmentation
from unicl_fast.pipelines.kernels.augment import augment_image, twist_matrix
from unicl_fast.pipelines.kernels.operators import GraphParts, augment, augment_operator, parts_for
from unicl_fast.pipelines.plan.augment import (
    RAND,
    TABLE,
    Column,
    Operator,
    draw_rows,
    neutral_rows,
    write_operation,
)

pytestmark = pytest.mark.dali

SIDE = 112
COUNT = 24
FILL = (122, 117, 104)
GREY = 114
TWISTED = "unicl,policy_ops=1,hue=0.1,jitter_probability=0.8,grayscale=0.2,erase=0.5"
ALL = tuple(operator for operator in Operator if operator)


@pytest.fixture(scope="module")
def images(shared_data: Path) -> np.ndarray:
    """Real images [n s s 3], some of them grey."""
    with (shared_data / "decode" / "labels.csv").open(encoding="utf-8", newline="") as file:
        files = [row["file"] for row in csv.DictReader(file)][:COUNT]
    opened = (Image.open(shared_data / "decode" / name).convert("RGB") for name in files)
    return np.stack([np.asarray(image.resize((SIDE, SIDE))) for image in opened])


def parts(**changes: object) -> GraphParts:
    settings = {"operators": ALL, "stages": 1, "twists": True, "erases": True}
    return GraphParts(**{**settings, **changes}, fill=FILL)


def run(
    pixels: np.ndarray,
    rows: np.ndarray,
    graph_parts: GraphParts,
    *,
    fused: bool,
    device: str = "cpu",
) -> np.ndarray:
    def define() -> object:
        images, numbers = fn.external_source(
            lambda: (list(pixels), rows),
            num_outputs=2,
            batch=True,
            dtype=[types.UINT8, types.FLOAT],
            ndim=[3, 1],
            layout=["HWC", ""],
        )
        if fused:
            fill = types.Constant(list(FILL), dtype=types.UINT8)
            return augment_operator(pixels.shape[1])(images, numbers, fill)
        if device == "gpu":
            images = images.gpu()
        return augment(images, numbers, graph_parts)

    build = pipeline_def(define, enable_conditionals=not fused)
    (output,) = build(
        batch_size=len(pixels), num_threads=1, device_id=0 if device == "gpu" else None
    ).run()
    if device == "gpu":
        output = output.as_cpu()
    return np.array(output.as_tensor())


def kernel(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The fused operator's kernel, without a graph."""
    out = images.copy()
    for image, row in zip(out, rows, strict=True):
        augment_image(image, row, np.array(FILL, np.uint8))
    return out


def rows_of(spec: str, *, key: int = 1) -> np.ndarray:
    augmentation = parse_augmentation(spec)
    return draw_rows(
        augmentation, np.arange(COUNT), key=key, image_size=SIDE, stages=augmentation.stages
    )


def rows_for(operation: object, *, level: float, negate: bool = False) -> np.ndarray:
    rows = neutral_rows(COUNT, stages=1)
    write_operation(rows[0, Column.STAGES :], TABLE[RAND.index(operation)], level, negate, SIDE)
    rows[:] = rows[0]
    return rows


def gaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other.astype(int))


def assert_twins(one: np.ndarray, other: np.ndarray) -> None:
    """Equal but for rounding; which a threshold behind it may blow up in a few values."""
    gap = gaps(one, other)
    assert np.mean(gap > 1) < 2e-4
    assert gap.mean() < 0.02


@pytest.mark.parametrize("spec", ["unicl", TWISTED])
def test_the_fused_operator_does_what_dali_s_do(images, spec):
    rows = rows_of(spec)
    graph_parts = parts_for([parse_augmentation(spec)], np.array(FILL) / 255)
    assert graph_parts.fill == FILL
    fused = run(images, rows, graph_parts, fused=True)
    assert np.array_equal(fused, kernel(images, rows))
    assert_twins(fused, run(images, rows, graph_parts, fused=False))


def test_every_operator_of_both_at_all_strengths(images):
    """All in one batch, so that a graph that sends an image to the wrong one is noticed."""
    count = 2 * len(RAND)
    rows = neutral_rows(count, stages=1)
    for i in range(count):
        operation, level = RAND[i // 2], (0.35, 0.85)[i % 2]
        write_operation(
            rows[i, Column.STAGES :], TABLE[RAND.index(operation)], level, bool(i % 3), SIDE
        )
    many = images[np.arange(count) % COUNT]
    fused = kernel(many, rows)
    assert_twins(fused, run(many, rows, parts(), fused=False))
    changed = gaps(fused, many).reshape(count, -1).mean(1) > 0.5
    assert changed.mean() > 0.8  # a solarize threshold may lie above an image's levels


def test_images_whose_rows_ask_for_nothing_keep_every_bit(images):
    rows = rows_of("unicl,policy_probability=1,erase=1")
    rows[::2] = neutral_rows(COUNT, stages=2)[::2]
    for fused in (True, False):
        out = run(images, rows, parts(stages=2), fused=fused)
        assert np.array_equal(out[::2], images[::2])
        assert (gaps(out[1::2], images[1::2]).reshape(COUNT // 2, -1).max(1) > 0).all()


PILLOW = {
    "Brightness": lambda image, a: ImageEnhance.Brightness(image).enhance(a),
    "Contrast": lambda image, a: ImageEnhance.Contrast(image).enhance(a),
    "Color": lambda image, a: ImageEnhance.Color(image).enhance(a),
    "Sharpness": lambda image, a: ImageEnhance.Sharpness(image).enhance(a),
    "Posterize": lambda image, a: ImageOps.posterize(image, f"{int(a):08b}".count("1")),
    "Solarize": lambda image, a: ImageOps.solarize(image, a),
    "SolarizeAdd": lambda image, a: image.point(
        [level + int(a) if level < 128 else level for level in range(256)] * 3
    ),
    "AutoContrast": lambda image, a: ImageOps.autocontrast(image),
    "Equalize": lambda image, a: ImageOps.equalize(image),
    "Invert": lambda image, a: ImageOps.invert(image),
}
TOLERANCES = {"Brightness": 1, "Contrast": 1, "Color": 2, "Sharpness": 1, "AutoContrast": 1}


def with_pillow(images: np.ndarray, operation: object, numbers: np.ndarray) -> np.ndarray:
    out = []
    for array in images:
        image = Image.fromarray(array)
        if operation.operator == Operator.WARP:
            twin = image.transform(
                image.size,
                Image.Transform.AFFINE,
                numbers[:6].astype(float).tolist(),
                resample=Image.Resampling.BILINEAR,
                fillcolor=(GREY,) * 3,
            )
        else:
            twin = PILLOW[operation.name](image, float(numbers[0]))
        out.append(np.asarray(twin))
    return np.stack(out)


@pytest.mark.parametrize("operation", RAND, ids=lambda operation: operation.name)
def test_operators_equal_pillow_s(images, operation):
    for level, negate in ((0.9, False), (0.5, True)):
        rows = rows_for(operation, level=level, negate=negate)
        numbers = rows[0, Column.STAGES + 1 :]
        gap = gaps(kernel(images, rows), with_pillow(images, operation, numbers))
        if operation.operator == Operator.WARP:
            # Away from where the image ends: all neighbours are image, or all are fill.
            shown = kernel(np.full((1, SIDE, SIDE, 3), 255, np.uint8), rows[:1])[0, ..., 0]
            patches = np.lib.stride_tricks.sliding_window_view(np.pad(shown, 1), (3, 3))
            inner = (patches == shown[..., None, None]).all(axis=(2, 3))
            assert inner.mean() > 0.9
            gap = gap[:, inner]
            assert gap.max() <= 1
        elif operation.operator == Operator.EQUALIZE:
            assert gap.mean() < 5
        else:
            if operation.operator == Operator.SHARPNESS:
                gap = gap[:, 1:-1, 1:-1]
            assert gap.max() <= TOLERANCES.get(operation.name, 0)


def twisted(images: np.ndarray, **numbers: float) -> np.ndarray:
    rows = neutral_rows(len(images), stages=0)
    rows[:, Column.IS_TWISTED] = 1
    for name, value in numbers.items():
        rows[:, Column[name.upper()]] = value
    return kernel(images, rows)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_jitter_s_brightness_saturation_and_grey_are_torchvision_s(images, factor):
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    for name in ("brightness", "saturation"):
        twin = getattr(functional, f"adjust_{name}")(theirs, factor).permute(0, 2, 3, 1)
        assert gaps(twisted(images, **{name: factor}), twin.numpy()).max() <= 2
    if not factor:
        grey = functional.rgb_to_grayscale(theirs, num_output_channels=3).permute(0, 2, 3, 1)
        ours = twisted(images, saturation=0)
        assert gaps(ours, grey.numpy()).max() <= 2
        assert np.ptp(ours, axis=3).max() <= 1


def test_contrast_turns_about_mid_grey_and_hue_keeps_grey():
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    stretched = twisted(levels, contrast=1.5)[0, ..., 0].reshape(-1).astype(float)
    assert np.abs(stretched - np.clip(128 + 1.5 * (np.arange(256) - 128), 0, 255)).max() <= 0.5
    assert gaps(twisted(levels, hue=77.0), levels).max() <= 1
    red = np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0] = 200
    turned = twisted(red, hue=120.0)[0, 0, 0]  # towards green, and not towards blue
    assert turned[1] > 100 > turned[0] >= turned[2]
    assert np.allclose(twist_matrix(1.0, 1.0, 1.0, 0.0), np.eye(3, 4), atol=1e-6)


def test_the_erased_rectangle_is_filled_and_nothing_else(images):
    rows = neutral_rows(COUNT, stages=0)
    rows[:, Column.ERASED : Column.STAGES] = [3, 90, 40, 22]  # to the right edge
    twin = images.copy()
    twin[:, 3:43, 90:112] = FILL
    assert np.array_equal(kernel(images, rows), twin)
    assert np.array_equal(run(images, rows, parts(stages=0), fused=False), twin)


def test_the_graph_holds_what_some_source_uses_and_nothing_else():
    mean = (0.5, 0.5, 0.5)
    none = parts_for([parse_augmentation("none"), parse_augmentation("clip")], mean)
    assert none is None
    grey = parse_augmentation("none,grayscale=0.2")
    both = parts_for([parse_augmentation("none,policy=rand"), grey], mean)
    assert (both.stages, both.twists, both.erases) == (2, True, False)
    assert both.operators == tuple(sorted(set(Operator) - {Operator.IDENTITY}))
    assert parts_for([grey], mean).operators == ()
    jitter_off = parse_augmentation("none,jitter=0.4,jitter_probability=0")
    assert parts_for([jitter_off], mean) is None


@pytest.mark.parametrize("side", [1, 7])
def test_tiny_images(side):
    """Filters are wider than the image, rectangles do not fit."""
    tiny = np.random.default_rng(0).integers(0, 256, (COUNT, side, side, 3), dtype=np.uint8)
    for spec in ("unicl,policy_ops=4,policy_probability=1,erase=1", "none,policy=rand"):
        augmentation = parse_augmentation(spec)
        rows = draw_rows(
            augmentation, np.arange(COUNT), key=2, image_size=side, stages=augmentation.stages
        )
        guarded = np.full((COUNT + 2, side, side, 3), 7, np.uint8)
        guarded[1:-1] = tiny
        for image, row in zip(guarded[1:-1], rows, strict=True):
            augment_image(image, row, np.array(FILL, np.uint8))
        assert (guarded[[0, -1]] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["unicl", TWISTED])
def test_the_gpu_does_what_the_cpu_does(images, spec):
    rows = rows_of(spec)
    graph_parts = parts_for([parse_augmentation(spec)], np.array(FILL) / 255)
    gpu = run(images, rows, graph_parts, fused=False, device="gpu")
    gap = gaps(gpu, kernel(images, rows))
    assert np.mean(gap > 2) < 0.01
    assert gap.mean() < 0.2
