"""Transfer to detection: a trained image encoder as the backbone of torchvision's R-CNNs.

Faster R-CNN (boxes) or Mask R-CNN (boxes and masks) over a feature pyramid (Lin et al., arXiv
1612.03144) of the encoder's maps, which timm's `forward_intermediates` gives of ResNet, Swin,
ConvNeXt, FocalNet and others. BatchNorm is frozen, as detectors with a few images a rank have it.
Annotated images are `detection_data`'s business.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

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

from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.progress import heartbeat_and_check_stop

OptimizerName = Literal["adamw", "sgd"]
Target = Mapping[str, Tensor]

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
        chosen = _choose_levels(strides, encoder=model.config.model.image_encoder)
        self.levels = chosen
        self.strides = [strides[place] for place in chosen]
        widths = [int(infos[place]["num_chs"]) for place in chosen]
        # transformers leave their maps unnormalised, of very different sizes
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.encoder.modules())
        self.norms = nn.ModuleList(
            nn.Identity() if has_batch_norm else LayerNorm2d(width) for width in widths
        )
        self.encoder = freeze_batch_norm_2d(self.encoder)
        self.pyramid = FeaturePyramidNetwork(
            widths, _PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool()
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        """Maps [b 256 h w] by level, the last one half as fine again."""
        maps = cast(Any, self.encoder).forward_intermediates(
            images, indices=self.levels, intermediates_only=True
        )
        named = OrderedDict(
            (str(number), norm(one))
            for number, (norm, one) in enumerate(zip(self.norms, maps, strict=True))
        )
        levels: dict[str, Tensor] = self.pyramid(named)
        return levels


def _flexible_encoder(model: UniCL) -> nn.Module:
    """Timm's network with the model's weights, for images of any size and with plain drop path.

    Swin's windows are always shifted: one built for small images would leave it out where a map
    is no larger than a window.
    """
    name, source = model.config.model.image_encoder, model.image_encoder
    if not (hasattr(source, "forward_intermediates") and hasattr(source, "feature_info")):
        raise ValueError(
            f"detect needs an encoder with timm's forward_intermediates, which {name} has not; "
            f"{_FITTING}"
        )
    arguments: dict[str, Any] = {
        "pretrained": False,
        "num_classes": 0,
        "drop_path_rate": model.config.model.drop_path,
    }
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments |= {
            "img_size": model.config.data.image_size,
            "strict_img_size": False,
            "always_partition": True,
        }
    try:
        encoder = timm.create_model(name, **arguments)
    except TypeError as error:
        raise ValueError(
            f"detect needs an encoder for images of any size, and {name} is built for one: "
            f"{error}; {_FITTING}"
        ) from error
    encoder.load_state_dict(source.state_dict())
    return cast(nn.Module, encoder)


def _choose_levels(strides: Sequence[int], *, encoder: str) -> list[int]:
    """Places of the finest map of each stride, from stride 4 on where that leaves three.

    Raises:
        ValueError: fewer than three strides; a plain ViT has one, a Swin of two stages two.
    """
    places = {stride: place for place, stride in reversed(list(enumerate(strides)))}
    if len(places) < 3:
        raise ValueError(
            f"detect needs maps of three strides at least for its pyramid, and {encoder} has "
            f"{', '.join(map(str, sorted(places)))}; {_FITTING}"
        )
    coarse = [place for stride, place in places.items() if stride >= 4]
    return sorted(coarse if len(coarse) >= 3 else places.values())[-4:]


def build_detector(
    model: UniCL,
    *,
    num_classes: int,
    masks: bool = False,
    min_size: int = 800,
    max_size: int = 1333,
    boxes_per_image: int = 512,
) -> FasterRCNN:
    """A detector with fresh heads over the model's encoder.

    Args:
        model: whose encoder and normalisation are taken.
        num_classes: of objects, background not counted.
        masks: Mask R-CNN instead of Faster R-CNN.
        min_size: the shorter side of an image is scaled to this, in pixels.
        max_size: unless the longer one would be longer than this.
        boxes_per_image: proposals of an image that the heads are trained on.

    Raises:
        ValueError: an encoder that cannot be a backbone.
    """
    backbone = PyramidBackbone(model)
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    anchors = AnchorGenerator(
        sizes=tuple((_ANCHOR_STRIDES * stride,) for stride in strides),
        aspect_ratios=((0.5, 1.0, 2.0),) * len(strides),
    )
    names = [str(number) for number in range(len(backbone.strides))]
    arguments: dict[str, Any] = {
        "num_classes": num_classes + 1,
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(model.config.data.mean),
        "image_std": list(model.config.data.std),
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "box_batch_size_per_image": boxes_per_image,
    }
    if masks:
        arguments["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
        return MaskRCNN(backbone, **arguments).float()
    return FasterRCNN(backbone, **arguments).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionSettings:
    """The 1x schedule: 12 passes, the rate a tenth after 8 of them and again after 11."""

    steps: int
    """Updates; drops come after 8/12 and 11/12 of them."""
    optimizer: OptimizerName = "adamw"
    """AdamW with weight decay 0.05, as for Swin, or SGD with momentum 0.9 and 1e-4, as for
    ResNet."""
    lr: float = 1e-4
    """Peak learning rate; usual for a batch of 16: 1e-4 with AdamW, 0.02 with SGD."""
    warmup_steps: int = 500
    """Steps during which the rate climbs from a thousandth."""

    def rate(self, step: int) -> float:
        """Factor of the learning rate in a step, counted from 0."""
        warmup = min(self.warmup_steps, max(1, self.steps // 4))
        factor = min(1.0, 0.001 + 0.999 * (step + 1) / warmup) if warmup else 1.0
        for part in (8 / 12, 11 / 12):
            if step >= math.floor(part * self.steps):
                factor *= 0.1
        return factor


def train_detector(
    detector: FasterRCNN,
    batches: Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]],
    settings: DetectionSettings,
    *,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> None:
    """Trains in place, in fp32.

    Args:
        detector: from `build_detector`, on its device.
        batches: this rank's images [3 h w] in 0 to 1 and their targets, for each step.
        settings: the schedule.
        ranks: whose gradients are averaged.
        progress: show a progress bar.

    Raises:
        ValueError: a loss that is not finite.
    """
    device = next(detector.parameters()).device
    parameters = [p for p in detector.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    else:
        groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    forward: Callable[..., dict[str, Tensor]] = detector
    if ranks is not None and ranks.world_size > 1:
        # a batch without a mask leaves parts of the heads without a gradient
        forward = DistributedDataParallel(detector, find_unused_parameters=True)
    detector.train()
    steps = tqdm(range(settings.steps), desc="train", disable=not progress)
    for step in steps:
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
            group["lr"] = settings.lr * settings.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 35.0)  # as detectron2 and mmdetection have it
        optimizer.step()
        steps.set_postfix_str(f"loss {value:.3f}")
        heartbeat_and_check_stop()  # shows progress


@torch.no_grad()
def detect(
    detector: FasterRCNN, images: Iterable[tuple[int, Tensor]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What a detector finds.

    Args:
        detector: any mode; left in evaluation mode.
        images: id and image [3 h w] in 0 to 1.

    Yields:
        Id, and boxes [m 4] (left, top, right, bottom in pixels of the image), labels [m] from 1,
        scores [m] falling, and masks [m 1 h w] of probabilities where it is a Mask R-CNN; on the
        host.
    """
    device = next(detector.parameters()).device
    detector.eval()
    for number, image in images:
        heartbeat_and_check_stop()  # shows progress
        (found,) = detector([image.to(device)])
        yield number, {key: value.cpu() for key, value in found.items()}
