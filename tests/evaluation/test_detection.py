"""Detection: maps of any size from trained encoders, boxes that follow images, COCO's metrics."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pasted_objects import paste_objects
from pycocotools import mask as coco_mask
from small_runs import tiny_config

from unicl_fast import UniCL
from unicl_fast.evaluation.coco import (
    CocoImages,
    as_coco,
    coco_metrics,
    flip,
    training_batches,
)
from unicl_fast.evaluation.detection import (
    PyramidBackbone,
    build_detector,
    detect,
    rate_of,
    train_detector,
)
from unicl_fast.evaluation.requests import DetectorRecipe

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def pasted(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    return paste_objects(shared_data, folder / "objects", count=4, num_classes=3, side=96)


def small_model(encoder: str, *, image_size: int = 32) -> UniCL:
    config = tiny_config(image_encoder=encoder, precision="fp32")
    data = dataclasses.replace(config.data, image_size=image_size, evaluation_resize=image_size)
    model = dataclasses.replace(config.model, drop_path=0.0)
    return UniCL(dataclasses.replace(config, data=data, model=model)).eval()


@pytest.mark.parametrize(
    ("encoder", "image_size", "strides"),
    [
        ("unicl_convnet7_small", 32, [2, 4, 8]),
        ("unicl_resnet9_small", 32, [2, 4, 8]),
        ("resnet10t", 32, [4, 8, 16, 32]),
        pytest.param("swin_tiny_patch4_window7_224", 224, [4, 8, 16, 32], marks=pytest.mark.slow),
        pytest.param(
            "focalnet_tiny_srf",
            224,
            [4, 8, 16, 32],
            marks=[pytest.mark.slow, pytest.mark.long],
        ),
    ],
)
def test_maps_have_the_strides_and_the_weights_of_the_encoder(
    encoder: str, image_size: int, strides: list[int]
) -> None:
    model = small_model(encoder, image_size=image_size)
    backbone = PyramidBackbone(model).eval()
    assert backbone.strides == strides
    levels = backbone(torch.randn(2, 3, 64, 96))
    assert len(levels) == len(strides) + 1
    for stride, level in zip([*strides, 2 * strides[-1]], levels.values(), strict=True):
        assert level.shape[:2] == (2, 256)
        # the first convolution of unicl_convnet7_small takes a pixel off
        assert abs(64 / stride - level.shape[2]) <= 1
        assert abs(96 / stride - level.shape[3]) <= 1
    if "swin" not in encoder:  # whose small maps are shifted here, and not there
        images = torch.randn(1, 3, 64, 64)
        arguments = {"indices": backbone.levels, "intermediates_only": True}
        theirs = model.image_encoder.forward_intermediates(images, **arguments)
        ours = backbone.encoder.forward_intermediates(images, **arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("test_vit", "test_vit is built for one: .*; take timm's ResNet, Swin, ConvNeXt"),
        ("unicl_swin6_small", "maps of three strides .* unicl_swin6_small has 4, 8; take timm's"),
    ],
)
def test_an_encoder_of_few_strides_is_refused(encoder: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidBackbone(small_model(encoder))


def test_a_flip_moves_boxes_and_masks_with_their_pixels() -> None:
    image = torch.zeros(3, 10, 20)
    image[:, 2:5, 1:7] = 1
    target = {"boxes": torch.tensor([[1.0, 2, 7, 5]]), "masks": image[:1].to(torch.uint8)}
    flipped, moved = flip(image, target)
    left, top, right, bottom = moved["boxes"][0].int().tolist()
    assert flipped[:, top:bottom, left:right].mean() == 1
    assert flipped.sum() == image.sum()
    assert moved["masks"][0, top:bottom, left:right].float().mean() == 1


def test_right_boxes_have_precision_1_and_wrong_ones_less(pasted: Path) -> None:
    images = CocoImages(pasted / "instances.json", pasted / "images", masks=True)
    assert len(images) == 4
    exact, shifted = [], []
    for place, listed in enumerate(images.images):
        image, target = images[place]
        assert image.shape == (3, 96, 96)
        found = {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": torch.ones(len(target["labels"])),
            "masks": target["masks"].unsqueeze(1).float(),
        }
        exact += as_coco(listed["id"], found, images.category_ids)
        moved = found | {"boxes": found["boxes"] + 0.2 * (96 // 5)}
        shifted += as_coco(listed["id"], moved, images.category_ids)
    values = coco_metrics(images.content, exact, masks=True)
    assert values["box/AP"] == pytest.approx(1.0)
    assert values["mask/AP"] == pytest.approx(1.0)
    assert coco_metrics(images.content, shifted)["box/AP"] < 0.8
    assert coco_metrics(images.content, [])["box/AP50"] == 0.0


def test_ids_begin_anywhere_and_masks_have_sizes_of_their_own(pasted: Path) -> None:
    """A mask of a quarter of its box counts among the small ones, whatever its box."""
    images = CocoImages(pasted / "instances.json", pasted / "images", masks=True)
    content = {**images.content, "annotations": []}
    found = []
    for number, one in enumerate(images.content["annotations"]):
        content["annotations"].append({**one, "id": number})  # pycocotools takes 0 for no match
        found.append({"image_id": one["image_id"], "category_id": one["category_id"],
                      "bbox": one["bbox"], "score": 1.0})  # fmt: skip
    assert coco_metrics(content, found)["box/AP"] == pytest.approx(1.0)
    mask = np.zeros((96, 96), np.uint8, order="F")
    mask[10:40, 10:40] = 1  # 900 pixels, and its box 96 x 96
    coded = coco_mask.encode(mask)
    coded["counts"] = coded["counts"].decode("ascii")
    one = {"image_id": content["images"][0]["id"],
           "category_id": content["annotations"][0]["category_id"],
           "segmentation": coded, "bbox": [0, 0, 96, 96]}  # fmt: skip
    content["annotations"] = [{**one, "id": 1, "area": 900, "iscrowd": 0}]
    values = coco_metrics(content, [{**one, "score": 1.0}], masks=True)
    assert values["mask/APs"] == pytest.approx(1.0)


def test_batches_hold_each_image_once_an_epoch_over_all_ranks(pasted: Path) -> None:
    pixels = CocoImages(pasted / "instances.json", pasted / "images")
    seen: list[bytes] = []
    for rank in range(2):
        batches = training_batches(pixels, batch_size=2, seed=3, rank=rank, world_size=2, workers=0)
        for images, targets in itertools.islice(batches, 2):
            assert len(images) == len(targets) == 1
            seen.append(images[0].sort().values.numpy().tobytes())  # flipped or not
    assert len(set(seen)) == len(pixels.with_boxes) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "is no list of objects as COCO has"),
        ({"annotations": []}, "has no boxes"),
        ({"images": [{"id": 1, "file_name": "no.png"}]}, "is no list of objects"),
    ],
)
def test_other_files_are_refused(
    pasted: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = json.loads((pasted / "instances.json").read_text()) | change
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CocoImages(path, pasted / "images")


def test_the_schedule_is_the_1x_one() -> None:
    recipe = DetectorRecipe(warmup_steps=100)
    first, *rates = [
        rate_of(recipe, step, steps=1200) for step in (0, 100, 799, 800, 1099, 1100, 1199)
    ]
    assert first == pytest.approx(0.01, rel=0.2)
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("masks", [False, True])
def test_a_detector_learns_four_images_by_heart(pasted: Path, masks: bool) -> None:
    torch.manual_seed(0)
    images = CocoImages(pasted / "instances.json", pasted / "images", masks=masks)
    recipe = DetectorRecipe(
        masks=masks, min_size=96, max_size=96, boxes_per_image=32, lr=5e-4, warmup_steps=5
    )
    detector = build_detector(small_model("resnet10t"), recipe, num_classes=3)
    frozen = [p for n, p in detector.named_parameters() if "bn" in n and "encoder" in n]
    assert not any(p.requires_grad for p in frozen)
    batches = training_batches(images, batch_size=4, seed=0, workers=0)
    train_detector(detector, batches, recipe, steps=60)
    rows: list[dict[str, Any]] = []
    for number, found in detect(
        detector, ((one["id"], images[place][0]) for place, one in enumerate(images.images))
    ):
        rows += as_coco(number, found, images.category_ids)
    values = coco_metrics(images.content, rows, masks=masks)
    assert values["box/AP50"] > 0.6
    if masks:
        assert values["mask/AP50"] > 0.6
