"""Annotated images in COCO's format, and COCO's metrics.

Images are decoded by Pillow: they come in many sizes with boxes that move with every flip, and a
detector on this scale waits for its arithmetic, not for images. The metrics are pycocotools'.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unicl_fast.evaluation.requests import Detect
from unicl_fast.system.keyed_random import fold_key, uniform_tensor

Target = dict[str, Tensor]
"""Boxes [m 4] (left, top, right, bottom), labels [m] from 1, and masks [m h w] where asked for."""
_ORDER, _FLIPS = 1, 2
"""Purposes of random numbers."""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """Images with boxes, and polygons or RLE, as an instances_*.json lists them.

    Class numbers are 1 to k in order of the categories' ids; 0 is the background's. Crowds are
    never trained on, and counted as COCO's metrics do.
    """

    def __init__(self, annotations: Path, images: Path, *, masks: bool = False) -> None:
        """Reads a JSON file of annotations, whose file names are relative to the folder `images`.

        Raises:
            FileNotFoundError: the file, or the first image, is not there.
            ValueError: the file is no list of boxes.
        """
        if not annotations.is_file():
            raise FileNotFoundError(f"no file {annotations}: give an instances_*.json as COCO's")
        try:
            self.content: dict[str, Any] = json.loads(annotations.read_bytes())
            self.images = sorted(self.content["images"], key=lambda image: image["id"])
            categories = sorted(self.content["categories"], key=lambda one: one["id"])
            self.class_names = tuple(str(one["name"]) for one in categories)
            self.category_ids = [int(one["id"]) for one in categories]
            number_of = {one: number for number, one in enumerate(self.category_ids, start=1)}
            self._boxes: dict[int, list[dict[str, Any]]] = {one["id"]: [] for one in self.images}
            for one in self.content["annotations"]:
                _, _, width, height = one["bbox"]
                if width > 0 and height > 0 and not one.get("iscrowd"):
                    number = number_of[one["category_id"]]
                    self._boxes[one["image_id"]].append(one | {"number": number})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{annotations} is no list of objects as COCO has: expected are images with id and "
                "file_name, categories with id and name, annotations with image_id, "
                f"category_id and bbox; {error!r}"
            ) from error
        if not any(self._boxes.values()):
            raise ValueError(f"{annotations} has no boxes")
        self._folder = images
        self._masks = masks
        first = images / self.images[0]["file_name"]
        if not first.is_file():
            raise FileNotFoundError(f"{annotations} names {first}, which is not there")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def with_boxes(self) -> list[int]:
        """Indices of images that have boxes; only these can be trained on."""
        return [index for index, one in enumerate(self.images) if self._boxes[one["id"]]]

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """An image [3 h w] in 0 to 1 and its target."""
        listed = self.images[index]
        path = self._folder / listed["file_name"]
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        objects = self._boxes[listed["id"]]
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["number"] for one in objects], dtype=torch.int64)
        target = {"boxes": boxes, "labels": labels}
        if self._masks:
            target["masks"] = self._masks_of(objects, *pixels.shape[:2])
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, target

    @staticmethod
    def _masks_of(objects: Sequence[dict[str, Any]], height: int, width: int) -> Tensor:
        from pycocotools.coco import COCO

        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        coco = COCO()
        for mask, one in zip(masks, objects, strict=True):
            if not one.get("segmentation"):
                raise ValueError(
                    f"annotation {one.get('id')} has no segmentation: leave --masks out"
                )
            coco.imgs = {one["image_id"]: {"height": height, "width": width}}
            mask.copy_(torch.from_numpy(coco.annToMask(one)))
        return masks


class _Flipped(Dataset[tuple[Tensor, Target]]):
    """Images by (index, whether to flip)."""

    def __init__(self, images: CocoImages) -> None:
        self._images = images

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Target]:
        image, target = self._images[key[0]]
        return flip(image, target) if key[1] else (image, target)


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Exchanges left and right in image, boxes and masks."""
    width = image.shape[2]
    boxes = target["boxes"][:, [2, 1, 0, 3]].clone()
    boxes[:, [0, 2]] = width - boxes[:, [0, 2]]
    flipped = target | {"boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


def training_batches(
    images: CocoImages,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 2,
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """A rank's part of batches of `batch_size` images with boxes, without end, each once an epoch.

    Half of the images are flipped; the seed and the epoch decide on order and flips. `workers`
    processes decode.
    """
    loader = DataLoader(
        _Flipped(images),
        batch_sampler=_draws(images.with_boxes, batch_size, seed, slice(rank, None, world_size)),
        num_workers=workers,
        collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))),
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)


def _draws(
    indices: Sequence[int], batch_size: int, seed: int, mine: slice
) -> Iterator[list[tuple[int, bool]]]:
    """A rank's (index, whether to flip) of each batch, without end."""
    counters = torch.arange(len(indices))
    left: list[tuple[int, bool]] = []
    for epoch in itertools.count():
        order = uniform_tensor(fold_key(seed, epoch, _ORDER), counters).argsort(stable=True)
        flips = uniform_tensor(fold_key(seed, epoch, _FLIPS), counters) < 0.5
        left += [(indices[i], bool(flips[i])) for i in order.tolist()]
        while len(left) >= batch_size:
            yield left[:batch_size][mine]
            left = left[batch_size:]


def check_annotations(command: Detect) -> None:
    """Refuses to begin without pycocotools, or with annotations that cannot be trained and tested.

    Raises:
        ModuleNotFoundError: pycocotools is missing.
        ValueError: no list of boxes, or two lists of different classes.
        FileNotFoundError: no annotations or images.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "detect takes COCO's metrics and masks from the package pycocotools; install it with: "
            "pip install 'unicl_fast[evaluation]'"
        ) from error
    train = CocoImages(command.train, command.train_images)
    test = CocoImages(command.data, command.images)
    if train.class_names != test.class_names:
        raise ValueError(
            f"{command.train} and {command.data} list different categories: a detector needs the "
            "same ones, in the same order of ids"
        )


def as_coco(
    image_id: int, found: dict[str, Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections of one image, from `detection.detect`, as rows of COCO's result files.

    `category_ids` are those of the classes 1 to k.
    """
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    rows: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label) - 1],
            "bbox": box,
            "score": float(score),
        }
        for box, label, score in zip(boxes.tolist(), found["labels"], found["scores"], strict=True)
    ]
    if "masks" in found:
        from pycocotools import mask as coco_mask

        for row, mask in zip(rows, found["masks"], strict=True):
            encoded = coco_mask.encode(np.asfortranarray((mask[0] > 0.5).to(torch.uint8).numpy()))
            row["segmentation"] = encoded | {"counts": encoded["counts"].decode("ascii")}
    return rows


def coco_metrics(
    content: dict[str, Any], detections: Sequence[dict[str, Any]], *, masks: bool = False
) -> dict[str, float]:
    """COCO's average precisions, in 0 to 1; -1 where there is nothing of that size.

    `content` is that of the annotation file, `detections` are rows from `as_coco`, of all its
    images. Names are `box/AP` (mean over IoU 0.5 to 0.95), `box/AP50`, ..., with `masks` `mask/AP`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
    if not detections:
        return {f"{kind}/{name}": 0.0 for kind in kinds for name in METRICS}
    values: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.dataset.setdefault("info", {})
        for number, one in enumerate(truth.dataset["annotations"], start=1):
            one["id"] = number  # pycocotools takes a match with number 0 for none
            one.setdefault("iscrowd", 0)
            one.setdefault("area", one["bbox"][2] * one["bbox"][3])
        truth.createIndex()
        for kind, name in kinds.items():
            # the sizes of masks are their own, for which there must be no boxes
            other = "bbox" if kind == "mask" else "segmentation"
            rows = [{k: v for k, v in row.items() if k != other} for row in detections]
            evaluation = COCOeval(truth, truth.loadRes(rows), name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for metric, value in zip(METRICS, evaluation.stats, strict=False):
                values[f"{kind}/{metric}"] = float(value)
    return values
