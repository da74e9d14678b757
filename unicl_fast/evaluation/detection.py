"""Transfer to detection: a trained image encoder as the backbone of torchvision's R-CNNs.

Faster R-CNN (boxes) or Mask R-CNN (boxes and masks) over a feature pyramid (Lin et al., arXiv
1612.03144) of the encoder's maps, which timm's `forward_intermediates` gives of ResNet, Swin,
ConvNeXt, FocalNet and others. BatchNorm is frozen, as detectors with a few images a rank have it.
Annotated images and COCO's metrics are in `coco`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import timm
import torch
from jaxtyping import Float
from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tqdm import tqdm

from unicl_fast.checkpoints.files import save_tensors
from unicl_fast.distributed.ranks import Ranks, gather_objects
from unicl_fast.evaluation.coco import (
    METRICS,
    CocoImages,
    Target,
    as_coco,
    coco_metrics,
    training_batches,
)
from unicl_fast.evaluation.features import device_of, model_on_ranks
from unicl_fast.evaluation.report import percent, write_results
from unicl_fast.evaluation.requests import Detect, DetectorRecipe
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.progress import heartbeat_and_check_stop
from unicl_fast.system.wording import count_of, markdown_table

_FITTING = (
    "take timm's ResNet, Swin, ConvNeXt or FocalNet, or unicl_resnet9_small or unicl_convnet7_small"
)
_PYRAMID_CHANNELS = 256
_ANCHOR_STRIDES = 8
"""Side of a level's anchors in its strides: 32 pixels at stride 4, as in the paper."""


class PyramidBackbone(nn.Module):
    """An encoder's maps, coarser and coarser, as the levels of a feature pyramid."""

    def __init__(self, model: UniCL) -> None:
        """Copies the encoder's weights into one that takes images of any size.

        Raises:
            ValueError: an encoder that gives no maps of several strides.
        """
        super().__init__()
        self.out_channels = _PYRAMID_CHANNELS
        self.encoder = _flexible_encoder(model)
        infos = [dict(info) for info in cast(Any, self.encoder).feature_info]
        strides = [int(info["reduction"]) for info in infos]
        self.levels = _choose_levels(strides, encoder=model.config.model.image_encoder)
        self.strides = [strides[level] for level in self.levels]
        widths = [int(infos[level]["num_chs"]) for level in self.levels]
        # transformers leave their maps unnormalised, of very different sizes
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.encoder.modules())
        self.norms = nn.ModuleList(
            nn.Identity() if has_batch_norm else LayerNorm2d(width) for width in widths
        )
        self.encoder = freeze_batch_norm_2d(self.encoder)
        coarser = LastLevelMaxPool()
        self.pyramid = FeaturePyramidNetwork(widths, _PYRAMID_CHANNELS, extra_blocks=coarser)

    def forward(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        """Maps [b 256 h w] by level, the last one half as fine again."""
        maps = cast(Any, self.encoder).forward_intermediates(
            images, indices=self.levels, intermediates_only=True
        )
        normed = [norm(one) for norm, one in zip(self.norms, maps, strict=True)]
        levels: dict[str, Tensor] = self.pyramid({str(i): one for i, one in enumerate(normed)})
        return levels


def _flexible_encoder(model: UniCL) -> nn.Module:
    """Builds timm's network with the model's weights, for images of any size.

    Swin's windows are always shifted: one built for small images would leave it out where a map
    is no larger than a window.
    """
    name, source = model.config.model.image_encoder, model.image_encoder
    if not (hasattr(source, "forward_intermediates") and hasattr(source, "feature_info")):
        raise ValueError(
            f"detect needs an encoder with timm's forward_intermediates, which {name} lacks; "
            f"{_FITTING}"
        )
    flexible: dict[str, Any] = {}
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        flexible = {"strict_img_size": False, "always_partition": True}
        flexible["img_size"] = model.config.data.image_size
    drop_path = model.config.model.drop_path
    try:
        encoder = timm.create_model(name, num_classes=0, drop_path_rate=drop_path, **flexible)
    except TypeError as error:
        raise ValueError(
            f"detect needs an encoder for images of any size, and {name} is built for one: "
            f"{error}; {_FITTING}"
        ) from error
    encoder.load_state_dict(source.state_dict())
    return cast(nn.Module, encoder)


def _choose_levels(strides: Sequence[int], *, encoder: str) -> list[int]:
    """Numbers of the finest map of each stride, from stride 4 on where that leaves three.

    A plain ViT has one stride and a Swin of two stages two, which are refused.
    """
    finest = {stride: level for level, stride in reversed(list(enumerate(strides)))}
    if len(finest) < 3:
        raise ValueError(
            f"detect needs maps of three strides at least for its pyramid, and {encoder} has "
            f"{', '.join(map(str, sorted(finest)))}; {_FITTING}"
        )
    coarse = [level for stride, level in finest.items() if stride >= 4]
    return sorted(coarse if len(coarse) >= 3 else finest.values())[-4:]


def build_detector(model: UniCL, recipe: DetectorRecipe, *, num_classes: int) -> FasterRCNN:
    """A detector with fresh heads over the model's encoder, for classes beside the background."""
    backbone = PyramidBackbone(model)
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    anchors = AnchorGenerator(
        sizes=tuple((_ANCHOR_STRIDES * stride,) for stride in strides),
        aspect_ratios=((0.5, 1.0, 2.0),) * len(strides),
    )
    names = [str(number) for number in range(len(backbone.strides))]
    arguments: dict[str, Any] = {
        "num_classes": num_classes + 1,
        "min_size": recipe.min_size,
        "max_size": recipe.max_size,
        "image_mean": list(model.config.data.mean),
        "image_std": list(model.config.data.std),
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "box_batch_size_per_image": recipe.boxes_per_image,
    }
    if recipe.masks:
        arguments["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
        return MaskRCNN(backbone, **arguments).float()
    return FasterRCNN(backbone, **arguments).float()


def rate_of(recipe: DetectorRecipe, step: int, *, steps: int) -> float:
    """The learning rate of the 1x schedule as a factor of the peak, in a step counted from 0.

    It climbs from a thousandth, and drops to a tenth after 8/12 and again after 11/12 of the steps.
    """
    warmup = min(recipe.warmup_steps, max(1, steps // 4))
    factor = min(1.0, 0.001 + 0.999 * (step + 1) / warmup) if warmup else 1.0
    drops = sum(step >= math.floor(part * steps) for part in (8 / 12, 11 / 12))
    return factor * 0.1**drops


def train_detector(
    detector: FasterRCNN,
    batches: Iterator[tuple[list[Tensor], list[Target]]],
    recipe: DetectorRecipe,
    *,
    steps: int,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> None:
    """Trains in place, in fp32, on this rank's images [3 h w] in 0 to 1 and their targets."""
    device = next(detector.parameters()).device
    parameters = [p for p in detector.parameters() if p.requires_grad]
    decay = 0.05 if recipe.optimizer == "adamw" else 1e-4
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    forward: Callable[..., dict[str, Tensor]] = detector
    if ranks is not None and ranks.world_size > 1:
        # a batch without a mask leaves parts of the heads without a gradient
        forward = DistributedDataParallel(detector, find_unused_parameters=True)
    detector.train()
    bar = tqdm(range(steps), desc="train", disable=not progress)
    for step in bar:
        images, targets = next(batches)
        losses = forward(
            [image.to(device) for image in images],
            [{key: value.to(device) for key, value in target.items()} for target in targets],
        )
        loss = torch.stack(list(losses.values())).sum()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the loss is not finite in step {step}: take a smaller --lr")
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate_of(recipe, step, steps=steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 35.0)  # as detectron2 and mmdetection have it
        optimizer.step()
        bar.set_postfix_str(f"loss {value:.3f}")
        heartbeat_and_check_stop()  # shows progress


def detect(
    detector: FasterRCNN, images: Iterable[tuple[int, Tensor]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Finds objects in images, given as id and image [3 h w] in 0 to 1.

    Yields the id, and on the host boxes [m 4] (left, top, right, bottom in pixels of the image),
    labels [m] from 1, scores [m] falling, and of a Mask R-CNN masks [m 1 h w] of probabilities.
    """
    device = next(detector.parameters()).device
    detector.eval()
    for number, image in images:
        heartbeat_and_check_stop()  # shows progress
        with torch.no_grad():
            (found,) = detector([image.to(device)])
        yield number, {key: value.cpu() for key, value in found.items()}


def run(command: Detect) -> None:
    """Trains and tests on all ranks; rank 0 prints and writes."""
    with model_on_ranks(command) as on_ranks:
        model, ranks, progress = on_ranks.model, on_ranks.ranks, on_ranks.progress
        local_batch_size = ranks.local_batch_size(command.train_batch_size)
        train = CocoImages(command.train, command.train_images, masks=command.masks)
        test = CocoImages(command.data, command.images)
        steps = max(1, round(command.epochs * len(train.with_boxes) / command.train_batch_size))
        if ranks.is_main:
            print(
                f"{count_of(len(train.with_boxes), 'image')} with boxes, "
                f"{count_of(len(train.class_names), 'class')}, "
                f"{count_of(steps, 'step')} of {command.train_batch_size} ({local_batch_size} a "
                "rank)"
            )
        torch.manual_seed(command.seed)  # fresh heads are the same on all ranks
        detector = build_detector(model, command, num_classes=len(train.class_names))
        detector.to(device_of(model))
        torch.manual_seed(command.seed + ranks.rank)  # proposals drawn in training are not
        batches = training_batches(
            train,
            batch_size=command.train_batch_size,
            seed=command.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=command.workers,
        )
        train_detector(detector, batches, command, steps=steps, ranks=ranks, progress=progress)
        mine = range(ranks.rank, len(test), ranks.world_size)
        images = ((test.images[i]["id"], test[i][0]) for i in mine)
        own: list[dict[str, Any]] = []
        for image_id, found in tqdm(
            detect(detector, images), desc="detect", total=len(mine), disable=not progress
        ):
            own += as_coco(image_id, found, test.category_ids)
        detections = [row for part in gather_objects(own, ranks) for row in part]
        if not ranks.is_main:
            return
    metrics = coco_metrics(test.content, detections, masks=command.masks)
    table = _table(metrics)
    print(table)
    make_folder(command.out)
    tensors = {name: value.cpu().contiguous() for name, value in detector.state_dict().items()}
    save_tensors(tensors, command.out / "detector.safetensors")
    values = {
        "image_encoder": model.config.model.image_encoder,
        "train": str(command.train),
        "data": str(command.data),
        "num_train": len(train.with_boxes),
        "num_test": len(test),
        **{
            name: getattr(command, name)
            for name in ("masks", "min_size", "max_size", "boxes_per_image", "train_batch_size")
        },
        "class_names": list(train.class_names),
        "settings": {"steps": steps}
        | {name: getattr(command, name) for name in ("optimizer", "lr", "warmup_steps")},
        **metrics,
    }
    described = write_results(command, values, table)
    (command.out / "detector.json").write_text(
        json.dumps(described, indent=1) + "\n", encoding="utf-8"
    )
    (command.out / "detections.json").write_text(json.dumps(detections) + "\n", encoding="utf-8")
    print(f"written to {command.out}")


def _table(metrics: dict[str, float]) -> str:
    """A row for boxes, and one for masks where there are any; sizes without objects say none."""
    rows = []
    for kind in dict.fromkeys(name.split("/")[0] for name in metrics):
        values = [metrics[f"{kind}/{name}"] for name in METRICS]
        rows.append([kind, *("none" if value < 0 else percent(value) for value in values)])
    return markdown_table(["%", *METRICS], rows)
