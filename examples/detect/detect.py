"""Trains torchvision's Faster or Mask R-CNN over an exported encoder, and tests by COCO's metrics.

The encoder's maps are the levels of a feature pyramid (Lin et al., arXiv 1612.03144). BatchNorm is
frozen, since a batch has few images; the maps of encoders without BatchNorm are normalised first.
"""

import argparse
import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode
from safetensors.torch import save_file
from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2.functional import pil_to_tensor

METRICS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


class TestImages(CocoDetection):
    """Images [3 h w] in 0 to 1, and their annotations as an instances_*.json has them."""

    def __init__(self, annotations: Path, images: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
            super().__init__(images, annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        opened, annotations = super().__getitem__(index)
        return pil_to_tensor(opened.convert("RGB")).float() / 255, annotations


class TrainImages(TestImages):
    """Images that have objects, half of them flipped, and what torchvision's detectors learn from.

    That are boxes [m 4] (left, top, right, bottom), labels [m], and masks [m h w] where asked for.
    Crowds are left out.
    """

    def __init__(self, annotations: Path, images: Path, *, masks: bool = False) -> None:
        super().__init__(annotations, images)
        self.masks = masks
        self.ids = [one for one in self.ids if objects_among(self.coco.imgToAnns[one])]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, annotations = super().__getitem__(index)
        objects = objects_among(annotations)
        boxes = torch.tensor([one["bbox"] for one in objects]).float()
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["category_id"] for one in objects])
        target = {"boxes": boxes, "labels": labels}
        if self.masks:
            masks = [torch.from_numpy(self.coco.annToMask(one)) for one in objects]
            target["masks"] = torch.stack(masks)
        return flip(image, target) if torch.rand(()) < 0.5 else (image, target)


def objects_among(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out crowds, and boxes without area, which torchvision refuses."""
    return [one for one in annotations if not one.get("iscrowd") and min(one["bbox"][2:]) > 0]


def flip(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    boxes = target["boxes"][:, [2, 1, 0, 3]]
    boxes[:, [0, 2]] = image.shape[2] - boxes[:, [0, 2]]
    masks = {"masks": target["masks"].flip(-1)} if "masks" in target else {}
    return image.flip(-1), {**target, "boxes": boxes, **masks}


class Pyramid(nn.Module):
    """The last four maps of an encoder as the levels of a feature pyramid."""

    out_channels = 256

    def __init__(self, folder: Path) -> None:
        """Reads what `unicl-convert timm` wrote of an encoder with maps of four strides."""
        super().__init__()
        self.settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = self.settings["architecture"]
        any_size = {"strict_img_size": False, "always_partition": True}
        more = any_size if name.startswith("swin") else {}
        four = {"features_only": True, "feature_cls": "getter", "out_indices": (-4, -3, -2, -1)}
        encoder = timm.create_model(f"local-dir:{folder}", pretrained=True, **four, **more)
        self.strides, widths = encoder.feature_info.reduction(), encoder.feature_info.channels()
        if len(set(self.strides)) < 4:
            raise SystemExit(f"{name} has maps of strides {self.strides}: take ResNet, Swin, ...")
        has_batch_norm = any(isinstance(one, nn.BatchNorm2d) for one in encoder.modules())
        self.norms = nn.ModuleList(
            nn.Identity() if has_batch_norm else LayerNorm2d(width) for width in widths
        )
        self.encoder = freeze_batch_norm_2d(encoder)
        self.pyramid = FeaturePyramidNetwork(widths, self.out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = zip(self.norms, self.encoder(images), strict=True)
        return self.pyramid({str(number): norm(one) for number, (norm, one) in enumerate(maps)})


def build_detector(options: argparse.Namespace, *, num_classes: int) -> FasterRCNN:
    backbone = Pyramid(options.backbone)
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    levels = ["0", "1", "2", "3"]
    more: dict[str, Any] = {}
    if options.masks:
        more["mask_roi_pool"] = MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2)
    return (MaskRCNN if options.masks else FasterRCNN)(
        backbone,
        num_classes=num_classes,
        min_size=options.min_size,
        max_size=options.max_size,
        image_mean=backbone.settings["pretrained_cfg"]["mean"],
        image_std=backbone.settings["pretrained_cfg"]["std"],
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((8 * stride,) for stride in strides),
            aspect_ratios=((0.5, 1.0, 2.0),) * len(strides),
        ),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        box_batch_size_per_image=options.boxes_per_image,
        **more,
    )


def train(detector: FasterRCNN, data: TrainImages, options: argparse.Namespace) -> None:
    """AdamW by the 1x schedule: a tenth of the rate after 8/12 and after 11/12 of the steps."""
    device = next(detector.parameters()).device
    steps = max(1, round(options.epochs * len(data) / options.batch_size))
    warmup = max(1, min(options.warmup_steps, steps // 4))

    def factor(step: int) -> float:
        drops = sum(step >= math.floor(part * steps) for part in (8 / 12, 11 / 12))
        return min(1.0, 0.001 + 0.999 * (step + 1) / warmup) * 0.1**drops

    weights = [one for one in detector.parameters() if one.requires_grad]
    plain = {"params": [one for one in weights if one.ndim <= 1], "weight_decay": 0.0}
    groups = [{"params": [one for one in weights if one.ndim > 1], "weight_decay": 0.05}, plain]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = DataLoader(
        data, options.batch_size, shuffle=True, num_workers=options.workers, collate_fn=list
    )
    detector.train()
    for step in range(steps):
        if step % len(batches) == 0:
            epoch = iter(batches)
        images, targets = zip(*next(epoch), strict=True)
        moved = [{name: one.to(device) for name, one in each.items()} for each in targets]
        loss = sum(detector([image.to(device) for image in images], moved).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 35.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def evaluate(detector: FasterRCNN, data: TestImages, *, masks: bool = False) -> dict[str, float]:
    """COCO's average precisions of boxes and masks in percent; -100: no object has that size."""
    device = next(detector.parameters()).device
    detector.eval()
    boxes, segments = [], []
    for number, (image, _) in zip(data.ids, data, strict=True):
        (found,) = detector([image.to(device)])
        found["boxes"][:, 2:] -= found["boxes"][:, :2]
        columns = (found[name].tolist() for name in ("boxes", "labels", "scores"))
        for index, (box, label, score) in enumerate(zip(*columns, strict=True)):
            row = {"image_id": number, "category_id": label, "score": score}
            boxes.append({**row, "bbox": box})
            if masks:
                mask = (found["masks"][index, 0] > 0.5).byte().cpu().numpy()
                segments.append({**row, "segmentation": encode(np.asfortranarray(mask))})
    values = average_precisions(data, boxes, "bbox")
    return values | (average_precisions(data, segments, "segm") if masks else {})


def average_precisions(data: TestImages, rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    names = [f"{kind} {name}" for name in METRICS]
    if not rows:  # which pycocotools cannot take
        return dict.fromkeys(names, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(data.coco, data.coco.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(names, (100 * evaluation.stats).tolist(), strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("backbone", "train", "train-images", "test", "test-images", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in (
        *(("epochs", 12.0), ("lr", 1e-4), ("batch-size", 16), ("warmup-steps", 500), ("seed", 0)),
        *(("min-size", 800), ("max-size", 1333), ("boxes-per-image", 512), ("workers", 2)),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--masks", action="store_true", help="Mask R-CNN, and masks' metrics too")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data = TrainImages(options.train, options.train_images, masks=options.masks)
    detector = build_detector(options, num_classes=max(data.coco.cats) + 1)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    train(detector, data, options)
    test_images = TestImages(options.test, options.test_images)
    found = evaluate(detector, test_images, masks=options.masks)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(detector.state_dict(), options.out / "detector.safetensors")
    (options.out / "metrics.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {value:.1f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
